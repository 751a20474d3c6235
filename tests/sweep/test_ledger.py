"""What a trial is called."""

from __future__ import annotations

import pytest

from sft_lab import config as configs
from sft_lab.sweep.ledger import trial_name


def trial_id(*words: str) -> str:
    return trial_name(configs.to_config(configs.compose(words)))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("trainer.learning_rate=1e-3 seed=3", "seed=3 trainer.learning_rate=0.001"),
        ("peft=lora_r8", "peft.r=8 peft.lora_alpha=16"),
        ("model=tiny_llama", "model=tiny_llama trainer.learning_rate=2e-3"),
        ("tracking=none", "tracking.project=other tracking.tags=[a] sweep.name=x"),
        ("trainer.global_batch_size=16", "trainer.gradient_accumulation_steps=2"),
    ],
)
def test_trial_id_is_the_same_however_the_config_was_typed(one: str, other: str) -> None:
    assert trial_id(*one.split()) == trial_id(*other.split())


def test_trial_id_tells_trials_apart_and_says_what_they_are() -> None:
    typed = [
        "seed=1",
        "seed=2",
        "peft=lora_r8",
        "trainer.learning_rate=1e-3",
        "trainer.packing=true",
        "data.eval_rows=5",
    ]
    ids = [trial_id(words) for words in typed]
    assert len(set(ids)) == len(ids)
    assert ids[2].startswith("lora-r8-lr0.002-")
    assert ids[3].startswith("lora-r16-lr0.001-")
