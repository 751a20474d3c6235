"""`-m`: trials one after another, each a run of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Cli, online
from tests.fake_wandb import FakeWandb
from tests.test_run import check, read

pytestmark = pytest.mark.e2e

GRID = [
    "-m", "model=tiny_llama", "trainer.max_steps=5", "trainer.logging_steps=1", "data.train_rows=40",
    "data.eval_rows=4", "evaluation.rows=0",
]  # fmt: skip


def the_sweep(tmp_path: Path) -> Path:
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    return sweep


def test_a_grid_is_four_runs_in_one_group(cli: Cli, tmp_path: Path, wandb_server: FakeWandb) -> None:
    check(cli(*GRID, "peft=lora_r8,lora_r16", "trainer.learning_rate=1e-3,2e-3", env=online(wandb_server)))
    sweep = the_sweep(tmp_path)
    trials = sorted(p for p in sweep.iterdir() if p.is_dir())
    assert len(trials) == 4
    assert {read(trial / "status.json")["state"] for trial in trials} == {"completed"}
    rates = {read(trial / "preflight.json")["config"]["trainer"]["learning_rate"] for trial in trials}
    assert rates == {1e-3, 2e-3}
    runs = list(wandb_server.runs.values())
    assert len(runs) == 4
    assert {run.group for run in runs} == {sweep.name}
    assert {run.name for run in runs} == {trial.name for trial in trials}
    assert {run.exit_code for run in runs} == {0}


def test_a_failing_trial_leaves_the_others_alone(cli: Cli, tmp_path: Path, wandb_server: FakeWandb) -> None:
    """The second of four diverges; it is marked failed here and in W&B, and the two after it train."""
    words = ["peft=lora_r8", "trainer.learning_rate=1e-3,1e30,2e-3,3e-3", "trainer.max_grad_norm=0"]
    result = check(cli(*GRID, *words, env=online(wandb_server)), code=1)
    trials = sorted(p for p in the_sweep(tmp_path).iterdir() if p.is_dir())
    states = {trial.name: read(trial / "status.json")["state"] for trial in trials}
    assert sorted(states.values()) == ["completed"] * 3 + ["failed"]
    failed = next(name for name, state in states.items() if state == "failed")
    assert f"failed: {failed}" in result.stderr
    assert "diverged" in result.stderr
    assert {run.name: run.exit_code == 0 for run in wandb_server.runs.values()} == {
        name: state == "completed" for name, state in states.items()
    }
