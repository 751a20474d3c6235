"""Base weights that trials share: one copy of them, and proof that nothing changed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_lab import config as configs
from sft_lab import model as models
from sft_lab import shared
from sft_lab.schema import Config

IDS = torch.arange(8)[None]


def config_of(*words: str) -> Config:
    return configs.to_config(configs.compose(["model=tiny_llama", *words]))


def addresses(model: Any) -> list[int]:
    """Where the parameters lie, and what 4-bit ones are scaled by."""
    parameters = list(model.parameters())
    states = [parameter.quant_state for parameter in parameters if not parameter.is_floating_point()]
    tensors = [tensor for s in states for tensor in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
    return [tensor.data_ptr() for tensor in [*parameters, *tensors]]


def in_layers(model: Any) -> list[int]:
    """Where the scales lie that the 4-bit layers themselves refer to."""
    return [part.quant_state.absmax.data_ptr() for name, part in model.named_modules() if name.endswith("_proj")]


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_two_models_share_one_copy_of_the_weights(quant: str) -> None:
    config = config_of(f"quant={quant}")
    alone = models.load_model(config)(IDS).logits
    with shared.sharing():
        first = models.load_model(config)
        first.requires_grad_(False)
        before = addresses(first)
        first.model.layers[0].self_attn.q_proj = torch.nn.Identity()  # what a trial does to its modules stays its own
        shared.verify()
        second = models.load_model(config)
        assert addresses(second) == before
        assert all(p.requires_grad for p in second.parameters() if p.is_floating_point())
        assert torch.equal(second(IDS).logits, alone)


def test_the_scales_of_4_bit_weights_are_there_once() -> None:
    with shared.sharing():
        first, second = (models.load_model(config_of("quant=nf4")) for _ in range(2))
    own = [parameter.quant_state.absmax.data_ptr() for name, parameter in first.named_parameters() if "_proj" in name]
    assert len(set(own)) == len(own) == 14
    assert in_layers(first) == in_layers(second) == own


def test_weights_that_a_trial_changed_are_read_anew(capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of()
    with shared.sharing() as weights:
        first = models.load_model(config)
        original = first.model.norm.weight.clone()
        with torch.no_grad():
            first.model.norm.weight[0] += 1e-6  # a millionth, in one number
        assert not weights.verify()
        assert "the trial changed the base model's weights" in capsys.readouterr().out
        second = models.load_model(config)
    assert not set(addresses(second)) & set(addresses(first))
    assert torch.equal(second.model.norm.weight, original)


@pytest.mark.parametrize("part", ["absmax", "code", "offset", "state2.absmax", "state2.code"])
def test_scales_that_a_trial_changed_are_noticed(part: str) -> None:
    with shared.sharing() as weights:
        trial = models.load_model(config_of("quant=nf4"))
        assert weights.verify()
        held = trial.model.layers[1].mlp.up_proj.weight.quant_state
        *nested, name = part.split(".")
        for step in nested:
            held = getattr(held, step)
        getattr(held, name).mul_(2)
        assert not weights.verify()


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_that_grow_are_a_trials_own(tmp_path: Path, tied: bool, quant: str) -> None:
    tiny = models.load_model(config_of()).config.name_or_path
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny, tie_word_embeddings=tied)).save_pretrained(
            tmp_path
        )
    config = config_of(f"model.path={tmp_path}", f"quant={quant}")
    tokenizer = models.load_tokenizer(config_of().model)
    tokenizer.add_tokens(["<|one|>", "<|two|>"])

    def grown() -> Any:
        model = models.load_model(config)
        torch.manual_seed(1)  # for the new rows
        models.fit_embeddings(model, tokenizer)
        return model

    alone, drawn = grown(), torch.get_rng_state()
    assert alone.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert (alone.get_input_embeddings().weight is alone.get_output_embeddings().weight) == tied
    with shared.sharing() as weights:
        base = models.load_model(config)
        before, bytes_before = addresses(base), shared.digest(base)
        for _ in range(2):
            trial = grown()
            assert torch.equal(torch.get_rng_state(), drawn)  # the adapter's weights are drawn next
            assert (trial.get_input_embeddings().weight is trial.get_output_embeddings().weight) == tied
            assert shared.digest(trial) == shared.digest(alone)
            assert torch.equal(trial(IDS).logits, alone(IDS).logits)
            with torch.no_grad():  # as training does
                trial.get_input_embeddings().weight.add_(1)
                trial.get_output_embeddings().weight.add_(1)
            assert weights.verify()
            after = models.load_model(config)
            assert addresses(after) == before
            assert shared.digest(after) == bytes_before


@pytest.mark.gpu
def test_weights_that_a_trial_moved_are_put_back() -> None:
    """New weights are drawn where the old ones lie, and a GPU draws others."""
    with shared.sharing() as weights:
        models.load_model(config_of()).to("cuda")
        assert weights.verify()
        assert {parameter.device.type for parameter in models.load_model(config_of()).parameters()} == {"cpu"}


def test_another_dtype_or_attention_is_another_base() -> None:
    with shared.sharing():
        first = models.load_model(config_of())
        for words in (["model.attn_implementation=eager"], ["model.dtype=bfloat16"]):
            assert not set(addresses(models.load_model(config_of(*words)))) & set(addresses(first))


def test_outside_of_a_sweep_nothing_is_kept() -> None:
    first, second = models.load_model(config_of()), models.load_model(config_of())
    assert not set(addresses(first)) & set(addresses(second))
    with shared.sharing():
        kept = models.load_model(config_of())
    later = models.load_model(config_of())
    assert not set(addresses(later)) & set(addresses(kept))
