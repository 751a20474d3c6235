"""The adapter: `peft` to a LoraConfig."""

from __future__ import annotations

from typing import Any

from sft_lab.schema import PeftConfig


def build(peft: PeftConfig) -> Any:
    """The `LoraConfig` that SFTTrainer puts on the base, or None to train every weight."""
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
        **peft.extra,
    )
