"""Base weights that trials share: one copy of them, and proof that nothing changed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sft_lab import config as configs
from sft_lab import model as models
from sft_lab import shared
from sft_lab.schema import Config


def config_of(*words: str) -> Config:
    return configs.to_config(configs.compose(["model=tiny_llama", *words]))


def addresses(model: Any) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_two_models_share_one_copy_of_the_weights(quant: str) -> None:
    config = config_of(f"quant={quant}")
    ids = torch.arange(8)[None]
    alone = models.load_model(config)(ids).logits
    with shared.sharing():
        first = models.load_model(config)
        first.model.layers[0].self_attn.q_proj = torch.nn.Identity()  # what a trial does to its modules stays its own
        first.requires_grad_(False)
        shared.verify()
        second = models.load_model(config)
        assert addresses(second)[:1] == addresses(first)[:1]
        assert all(p.requires_grad for p in second.parameters() if p.is_floating_point())
        assert torch.equal(second(ids).logits, alone)


def test_weights_that_a_trial_changed_are_read_anew() -> None:
    config = config_of()
    with shared.sharing() as weights:
        first = models.load_model(config)
        original = first.model.norm.weight.clone()
        with torch.no_grad():
            first.model.norm.weight[0] += 1e-6  # a millionth, in one number
        assert not weights.verify()
        second = models.load_model(config)
    assert addresses(second) != addresses(first)
    assert torch.equal(second.model.norm.weight, original)


def test_another_dtype_or_attention_is_another_base() -> None:
    with shared.sharing():
        first = models.load_model(config_of())
        for words in (["model.attn_implementation=eager"], ["model.dtype=bfloat16"]):
            assert addresses(models.load_model(config_of(*words))) != addresses(first)


def test_outside_of_a_sweep_nothing_is_kept() -> None:
    assert addresses(models.load_model(config_of())) != addresses(models.load_model(config_of()))
    with shared.sharing():
        kept = models.load_model(config_of())
    assert addresses(models.load_model(config_of())) != addresses(kept)
