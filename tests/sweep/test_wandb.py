"""A sweep as a team sees it in Weights & Biases, with the real client and a server on this machine."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli, online
from tests.fake_wandb import FakeWandb, Run
from tests.sweep.test_sweep import SHORT, begun, states, trials
from tests.test_run import check

pytestmark = pytest.mark.e2e

RATES = "trainer.learning_rate=1e-3,2e-3"


def by_job_type(server: FakeWandb, job_type: str) -> list[Run]:
    return [run for run in server.runs.values() if run.job_type == job_type]


def test_group_lineage_summary_and_the_best_adapter(cli: Cli, tmp_path: Path, wandb_server: FakeWandb) -> None:
    words = ["-m", *SHORT, "sweep.name=s", "tracking.notes=why", "tracking.tags=[mine]"]
    linked = "sweep.link_best_to=wandb-registry-model/commands"
    check(cli(*words, linked, RATES, env=online(wandb_server)))

    runs = by_job_type(wandb_server, "trial")
    assert {run.name for run in runs} == {trial.name for trial in trials(tmp_path).values()}
    assert {run.group for run in wandb_server.runs.values()} == {"s"}
    assert {run.notes for run in runs} == {"why"}
    assert {tuple(run.tags) for run in runs} == {("mine", name) for name in trials(tmp_path)}
    (data,) = [a for a in wandb_server.artifacts.values() if a.type == "dataset"]
    assert data.files == []
    assert data.references
    assert all(any(data.name in used for used in run.used) for run in runs)

    (summary,) = by_job_type(wandb_server, "sweep")
    assert summary.name == "s"
    assert summary.tags == ["mine"]  # and of no single trial
    assert summary.exit_code == 0
    assert {"sweep/trials", "sweep/report"} <= {key for row in summary.history for key in row}
    best = min(runs, key=lambda run: run.summary["eval_loss"])
    assert summary.summary["best/eval_loss"] == best.summary["eval_loss"]
    (adapter,) = [a for a in wandb_server.artifacts.values() if "best" in a.aliases]
    assert adapter.name == "s-adapter"
    assert "adapter_model.safetensors" in adapter.files
    assert adapter.links == ["commands"] or "wandb-registry-model/commands" in adapter.links

    check(cli(*words, "trainer.learning_rate=1e-3,2e-3,4e-3", env=online(wandb_server)))
    assert len(by_job_type(wandb_server, "trial")) == 3
    (summary,) = by_job_type(wandb_server, "sweep")  # the same command again: the same run
    assert summary.summary["trials"] == 3


def test_an_outage_in_the_middle_loses_nothing(
    tmp_path: Path, wandb_server: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in online(wandb_server).items():
        monkeypatch.setenv(name, value)
    words = [
        "-m", *SHORT, "sweep.name=s", "trainer.learning_rate=1e-3,2e-3,3e-3", "tracking.init_timeout_s=3",
        "tracking.finish_timeout_s=3",
    ]  # fmt: skip
    process = begun(words, tmp_path, "trial 2/3")
    wandb_server.fail_with = 500
    out = process.communicate()[0]
    assert process.returncode == 0
    assert states(tmp_path) == ["completed"] * 3
    wandb_server.fail_with = 0
    commands = set(re.findall(r"wandb (sync .*)", out))
    assert len(commands) == 3  # trials 2 and 3, and the sweep itself
    for command in commands:
        arguments = shlex.split(command)
        subprocess.run([sys.executable, "-m", "wandb", *arguments], check=True, capture_output=True, timeout=60)
    synced = by_job_type(wandb_server, "trial")
    assert {run.name for run in synced} == {trial.name for trial in trials(tmp_path).values()}
    for run in synced:
        assert [step for step in run.steps if step > 0] == [1, 2, 3, 4]
        assert run.exit_code == 0
        assert "eval_loss" in run.summary
    (summary,) = by_job_type(wandb_server, "sweep")
    assert summary.summary["trials"] == 3
