"""What a run that goes on counts on from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sft_lab import ranks, unlogged


def trainer(loss: float = 0.0, logged_at: int = 7) -> Any:
    """What of the Trainer and of TRL's counts as a session begins, but for a sum of losses."""
    return SimpleNamespace(
        _tr_loss=torch.tensor(loss),
        _total_loss_scalar=0.0,
        _globalstep_last_logged=logged_at,
        _metrics={"train": {}},
        _total_train_tokens=0,
    )


def test_a_run_that_begins_counts_from_zero() -> None:
    fresh = trainer()
    unlogged.restore(unlogged.at(None), fresh)
    assert fresh == trainer()


def test_what_is_restored_is_what_was_kept_to_the_bit(tmp_path: Path) -> None:
    training = trainer(loss=0.1, logged_at=5)
    training._tr_loss += 1 / 3
    training._metrics["train"] = {"entropy": [0.1, 0.2]}
    training._total_train_tokens = 99
    unlogged.keep(tmp_path, training, events=3, tokens=98, time_s=1.5)
    kept = unlogged.at(tmp_path)
    assert (kept.events, kept.tokens, kept.time_s) == (3, 98, 1.5)
    again = trainer()
    unlogged.restore(kept, again)
    assert torch.equal(again._tr_loss, training._tr_loss)
    assert again._tr_loss.dtype == torch.float32
    assert again._total_loss_scalar == pytest.approx(-float(training._tr_loss))  # the loss of earlier sessions
    assert (again._globalstep_last_logged, again._total_train_tokens) == (5, 99)
    assert again._metrics == {"train": {"entropy": [0.1, 0.2]}}


@pytest.mark.parametrize(("index", "count", "loss"), [(0, 2, 1.0), (1, 2, 4.0), (0, 1, 2.5), (3, 4, 2.5)])
def test_each_rank_takes_its_own_and_others_than_before_their_mean(
    monkeypatch: pytest.MonkeyPatch, index: int, count: int, loss: float
) -> None:
    alike = {"logged_at": 5, "means_of": {}, "num_tokens": 9}
    kept = unlogged.Unlogged(of_ranks=[{"loss": 1.0, **alike}, {"loss": 4.0, **alike}])
    monkeypatch.setattr(ranks, "index", lambda: index)
    monkeypatch.setattr(ranks, "size", lambda: count)
    again = trainer()
    unlogged.restore(kept, again)
    assert (float(again._tr_loss), again._total_loss_scalar) == (loss, -2.5)
