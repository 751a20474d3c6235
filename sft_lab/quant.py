"""Quantisation of the frozen base: `quant` to a BitsAndBytesConfig."""

from __future__ import annotations

from typing import Any

from sft_lab.schema import QuantConfig


def build(quant: QuantConfig, compute_dtype: str, storage_dtype: str = "") -> Any:
    """The `BitsAndBytesConfig`, or None for a base in its own dtype.

    Args:
        compute_dtype: what bnb_4bit_compute_dtype=auto comes to.
        storage_dtype: as what the packed numbers are held, uint8 if empty. Sharding cuts weights of one dtype, so that
            it must be the one of all others (trl#1723).
    """
    if quant.method == "none":
        return None
    from transformers import BitsAndBytesConfig

    if quant.method == "bnb_8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=quant.llm_int8_threshold, **quant.extra)
    asked = quant.bnb_4bit_compute_dtype
    storage = {"bnb_4bit_quant_storage": storage_dtype} if storage_dtype else {}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quant.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype if asked == "auto" else asked,
        **{**storage, **quant.extra},
    )


def skipped(quant: QuantConfig, model: Any) -> list[str]:
    """Names of modules that stay as they are."""
    from transformers.quantizers.base import get_keys_to_not_convert

    asked = quant.extra.get("llm_int8_skip_modules")
    return list(asked) if asked is not None else list(get_keys_to_not_convert(model))


def keep_packing(model: Any) -> None:
    """Keep 4-bit weights as they were read, also in evaluation on CPUs that have avx512_bf16.

    There bitsandbytes packs them anew for a product that has no gradient, and uses it in training too from then on: an
    evaluation would spoil every step after it.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
