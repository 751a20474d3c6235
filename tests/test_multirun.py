"""`-m`: trials one after another, each a run of its own."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import Cli
from tests.test_run import check, read

GRID = [
    "-m", "model=tiny_llama", "trainer.max_steps=5", "trainer.logging_steps=1", "data.train_rows=40",
    "data.eval_rows=4", "evaluation.rows=0", "sweep.name=grid",
]  # fmt: skip


def wandb_runs(sweep: Path) -> list[dict[str, str]]:
    from sft_lab import wandb_file

    return [wandb_file.run_record(file) for file in sorted(sweep.glob("*/wandb/*run-*/run-*.wandb"))]


def test_a_grid_is_four_runs_in_one_group(cli: Cli, tmp_path: Path) -> None:
    check(cli(*GRID, "peft=lora_r8,lora_r16", "trainer.learning_rate=1e-3,2e-3"))
    sweep = tmp_path / "outputs" / "sweeps" / "grid"
    trials = sorted(sweep.iterdir())
    assert len(trials) == 4
    assert {read(trial / "status.json")["state"] for trial in trials} == {"completed"}
    rates = {read(trial / "preflight.json")["config"]["trainer"]["learning_rate"] for trial in trials}
    assert rates == {1e-3, 2e-3}
    runs = wandb_runs(sweep)
    assert len({run["id"] for run in runs}) == 4
    assert {run["group"] for run in runs} == {"grid"}
    assert {run["name"] for run in runs} == {trial.name for trial in trials}


def test_a_failing_trial_leaves_the_others_alone(cli: Cli, tmp_path: Path) -> None:
    result = check(cli(*GRID, "trainer.learning_rate=1e-3,1e30", "trainer.max_grad_norm=0", "peft=lora_r8"), code=1)
    trials = sorted((tmp_path / "outputs" / "sweeps" / "grid").iterdir())
    states = {trial.name: read(trial / "status.json")["state"] for trial in trials}
    assert sorted(states.values()) == ["completed", "failed"]
    failed = next(name for name, state in states.items() if state == "failed")
    assert f"failed: {failed}" in result.stderr
    assert "diverged" in result.stderr
    assert len({run["id"] for run in wandb_runs(tmp_path / "outputs" / "sweeps" / "grid")}) == 2
