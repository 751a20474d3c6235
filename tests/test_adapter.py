"""An adapter's files: all that was trained, in its shape, and made of numbers; or an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sft_lab import adapter
from sft_lab.errors import RunError

TRAINED: dict[str, tuple[int, ...]] = {"a.weight": (2, 3), "b.weight": (3, 2)}


@pytest.mark.parametrize(
    ("saved", "wrong"),
    [
        (TRAINED, 0),
        ({**TRAINED, "more": (1,)}, 0),
        ({"a.weight": (2, 3)}, 1),
        ({"a.weight": (2, 3), "b.weight": (0,)}, 1),  # a shard of a rank that has none of it
        ({}, 2),
    ],
)
def test_what_is_saved_is_all_that_is_trained(saved: dict[str, tuple[int, ...]], wrong: int, tmp_path: Path) -> None:
    save_file({name: torch.zeros(shape) for name, shape in saved.items()}, tmp_path / "adapter_model.safetensors")
    if not wrong:
        adapter.require_whole(TRAINED, tmp_path)
        return
    with pytest.raises(RunError, match=f"saving is not complete: {wrong} of 2 trained tensors"):
        adapter.require_whole(TRAINED, tmp_path)


def test_nothing_saved_at_all_is_told(tmp_path: Path) -> None:
    """As a sharded run's `save_model` leaves it."""
    with pytest.raises(RunError, match="2 of 2 trained tensors"):
        adapter.require_whole(TRAINED, tmp_path)


def test_a_tensor_that_is_not_finite_is_told(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.tensor([0.0, torch.nan])}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RunError, match="1 of 2 trained tensors are not finite, b is the first"):
        adapter.require_finite(tmp_path)
