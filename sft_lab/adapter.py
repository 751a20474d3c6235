"""The adapter: `peft` to a LoraConfig, and what is trained of it to files that hold all of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_lab.data.template import Template
from sft_lab.errors import RunError
from sft_lab.schema import PeftConfig

FILES = ("adapter_config.json", "config.json")  # one of them lies beside the weights


def build(peft: PeftConfig, new_tokens: dict[str, list[int]] | None = None) -> Any:
    """The `LoraConfig` that SFTTrainer puts on the base, or None to train every weight.

    `new_tokens` are rows of embeddings that are trained and saved beside LoRA's matrices, from `new_tokens`.
    """
    if peft.method == "none":
        return None
    from peft import LoraConfig

    extra = dict(peft.extra)
    whole = [*peft.modules_to_save, *peft.target_modules]  # are saved whole, or whole where they have grown
    tokens = _all_tokens(new_tokens or {}, extra.pop("trainable_token_indices", None), whole)
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
        trainable_token_indices=tokens or None,
        **extra,
    )


def _all_tokens(new: dict[str, list[int]], asked: Any, saved: Sequence[str]) -> Any:
    """New tokens and those of peft.extra.trainable_token_indices; a module that is saved whole needs none."""
    new = {name: ids for name, ids in new.items() if name.rpartition(".")[2] not in saved}
    if not new or not asked:
        return new or asked
    named: dict[str, Any] = dict(asked) if isinstance(asked, Mapping) else dict.fromkeys(new, asked)
    leaves = {name.rpartition(".")[2]: name for name in new}  # both ways to name an embedding mean the same one
    found = {name: set(ids) for name, ids in new.items()}
    for name, ids in named.items():
        found.setdefault(leaves.get(name, name), set()).update(ids)
    return {name: sorted(ids) for name, ids in found.items()}


def new_tokens(model: Any, template: Template, tokenizer: Any, new_rows: Sequence[int] = ()) -> dict[str, list[int]]:
    """The rows of each embedding that stand for tokens which the base has never seen, by the module's name.

    They are the tokens that the template brought along, and `new_rows`, those that the embedding lacked: these were
    drawn at random, so that a base that is loaded again has others.

    LoRA on all linear layers leaves embeddings alone, so that a new token would stay as it was drawn at random, both
    when read and, where the output embedding has weights of its own, when written (axolotl#1570).
    """
    ids = sorted({*tokenizer.convert_tokens_to_ids(list(template.added_tokens)), *new_rows})
    if not ids:
        return {}
    names = {id(module): name for name, module in model.named_modules()}
    read, write = model.get_input_embeddings(), model.get_output_embeddings()
    modules = [read] if model.config.get_text_config().tie_word_embeddings else [read, write]
    return {names[id(module)]: ids for module in modules}


# ------------------------------------------------------------------------------------------------------------ saving


def round_as_trained(model: Any) -> None:
    """Hold the adapter of a quantised base in bf16, as TRL does in training; PEFT loads it in fp32."""
    import torch

    for name, parameter in model.named_parameters():
        if "lora_" in name and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)


def trains_tokens(model: Any) -> bool:
    """Whether rows of embeddings are trained beside the adapter's matrices."""
    return any(
        getattr(config, "trainable_token_indices", None) for config in getattr(model, "peft_config", {}).values()
    )


def save_what_is_trained(model: Any) -> None:
    """Keep PEFT from saving embeddings whole where they have grown: the rows that are trained are saved by themselves.

    An embedding that LoRA adapts is still saved whole where it has grown, since LoRA does not hold its new rows.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel) and trains_tokens(model):
        model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def save(trainer: Any, folder: Path) -> None:
    """The adapter (for peft=none the model), whole, whatever the checkpoints' own form is; every rank takes part."""
    if not trainer.is_fsdp_enabled:
        trainer.save_model(str(folder))
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    kept = plugin.state_dict_type.name
    plugin.set_state_dict_type("FULL_STATE_DICT")  # sharded, `save_model` writes nothing and says nothing
    try:
        trainer.save_model(str(folder))
    finally:
        plugin.set_state_dict_type(kept)


def require_whole(expected: dict[str, tuple[int, ...]], folder: Path) -> None:
    """
    Args:
        expected: what `trained` found before the model was wrapped or sharded.

    Raises:
        RunError: `folder` lacks one of the tensors that are trained, or has it in another shape.
    """
    found = {name: shape for file in sorted(folder.glob("*.safetensors")) for name, shape in _shapes(file).items()}
    wrong = [name for name, shape in expected.items() if found.get(name) != shape]
    if wrong:
        raise RunError(
            f"saving is not complete: {len(wrong)} of {len(expected)} trained tensors are missing or of another shape "
            f"in {folder}, {wrong[0]} is the first"
        )


def trained(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each trained tensor, under the name that it has in the file."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict

    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}
    if not isinstance(model, PeftModel):
        return shapes
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kept = get_peft_model_state_dict(model, state_dict=empty, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in kept.items()}


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118


def is_finite(model: Any) -> bool:
    """Whether what this rank has of the trained weights is made of numbers."""
    import torch
    from torch.distributed.tensor import DTensor

    trained = [getattr(p, "ds_tensor", p) for p in model.parameters() if p.requires_grad]
    return all(bool(torch.isfinite(p.to_local() if isinstance(p, DTensor) else p).all()) for p in trained)


def require_finite(folder: Path) -> None:
    """
    Raises:
        RunError: a tensor in `folder` has a number that is none.
    """
    import torch
    from safetensors.torch import load_file

    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise RunError(f"{len(broken)} of {len(tensors)} trained tensors are not finite, {broken[0]} is the first")
