"""The adapter: `peft` to a LoraConfig."""

from __future__ import annotations

from typing import Any

from sft_lab.data.template import Template
from sft_lab.schema import PeftConfig


def build(peft: PeftConfig, new_tokens: dict[str, list[int]] | None = None) -> Any:
    """The `LoraConfig` that SFTTrainer puts on the base, or None to train every weight.

    `new_tokens` are rows of embeddings that are trained and saved beside LoRA's matrices, from `new_tokens`.
    """
    if peft.method == "none":
        return None
    from peft import LoraConfig

    targets: Any = peft.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=peft.r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=peft.modules_to_save or None,
        bias=peft.bias,
        use_rslora=peft.use_rslora,
        use_dora=peft.use_dora,
        **{"trainable_token_indices": new_tokens or None, **peft.extra},
    )


def new_tokens(model: Any, template: Template, tokenizer: Any) -> dict[str, list[int]]:
    """The rows of each embedding that stand for tokens which the template brought along, by the module's name.

    LoRA on all linear layers leaves embeddings alone, so that a new token would stay as it was drawn at random, both
    when read and, where the output embedding has weights of its own, when written (axolotl#1570).
    """
    if not template.added_tokens:
        return {}
    ids = sorted(tokenizer.convert_tokens_to_ids(list(template.added_tokens)))
    names = {id(module): name for name, module in model.named_modules()}
    read, write = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [read] if model.config.get_text_config().tie_word_embeddings else [read, write]
    return {names[id(module)]: ids for module in modules}
