"""Which checkpoints are there to go on from, and stay."""

from __future__ import annotations

import os
from pathlib import Path

from sft_lab import checkpoints, train
from sft_lab.runs import RunDirectory, write_json
from sft_lab.unlogged import Unlogged


def saved(run: RunDirectory, step: int) -> Path:
    checkpoint = checkpoints.at(run, step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_text("moments")
    write_json(checkpoint / "unlogged.json", vars(Unlogged(events=step)))
    checkpoints.seal(checkpoint)
    os.utime(checkpoint, (step, step))
    return checkpoint


def test_one_that_was_half_taken_away_costs_no_whole_one(tmp_path: Path) -> None:
    """The Trainer takes away what was longest as it is, which the one that a killed process was taking away is not."""
    run = RunDirectory(tmp_path)
    half, whole = saved(run, 7), saved(run, 14)
    (half / "optimizer.pt").unlink()
    assert train._rewind(run) == whole
    saved(run, 21)
    checkpoints.keep(run, 2)
    assert whole.is_dir()
    assert not half.exists()


def test_what_was_logged_after_a_checkpoint_is_taken_back(tmp_path: Path) -> None:
    """An evaluation at its own step too, where training has ended there."""
    run = RunDirectory(tmp_path)
    for step in (1, 2):
        run.append_metrics({"step": step, "split": "train"})
    saved(run, 2)
    run.append_metrics({"step": 2, "split": "eval"})
    train._rewind(run)
    assert [event["split"] for event in run.read_metrics()] == ["train", "train"]
