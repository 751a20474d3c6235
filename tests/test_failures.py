"""What a run says that ends for want of something: what happened, and what to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sft_lab import config as configs
from sft_lab.errors import RunError
from sft_lab.failures import explained
from sft_lab.runs import RunDirectory

TOO_MUCH = 1 << 60  # bytes; no machine has as many to give


@pytest.mark.parametrize(
    "ask",
    [lambda: torch.empty(TOO_MUCH, dtype=torch.uint8), lambda: np.zeros(TOO_MUCH, dtype=np.uint8)],
    ids=["torch", "numpy"],
)
def test_a_want_of_memory_says_what_to_lower(ask: Callable[[], object], tmp_path: Path) -> None:
    """What torch and numpy really raise, each in words of its own."""
    config = configs.to_config(configs.compose(["model=tiny_llama", "trainer.per_device_train_batch_size=8"]))
    with pytest.raises(RunError) as raised, explained(config, RunDirectory(tmp_path)):
        ask()
    told = str(raised.value)
    assert told.startswith("out of memory: lower trainer.per_device_train_batch_size=8 (accumulation makes up for it)")
    assert f"trainer.max_length={config.trainer.max_length}" in told
    assert "quant=nf4" in told
    assert "\n" not in told


def test_an_error_of_another_kind_stays_what_it_is(tmp_path: Path) -> None:
    config = configs.to_config(configs.compose(["model=tiny_llama"]))
    with pytest.raises(ZeroDivisionError), explained(config, RunDirectory(tmp_path)):
        print(1 // 0)
