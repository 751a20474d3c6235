"""Slurm's warning: the first process puts the job back into the queue, and no other gives Slurm a reason to end it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_lab import meetings, outside, worker
from sft_lab.__main__ import main
from sft_lab.commands import env as verb
from sft_lab.errors import Interrupted, RunError, SftLabError
from sft_lab.outside import Group

SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_STEP_NUM_TASKS")
Scontrol = Callable[..., Path]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scontrol:
    """Installs one as the only program there is, and sets the job's variables; returns where what it was told stands."""
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)

    def install(fails_with: str = "", **job: str) -> Path:
        told = tmp_path / "told"
        program = tmp_path / "scontrol"
        ends = f'echo "{fails_with}" >&2; exit 1' if fails_with else ""
        program.write_text(f'#!/bin/sh\necho "$*" >> {told}\n{ends}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        for name, value in job.items():
            monkeypatch.setenv(name, value)
        return told

    return install


def test_a_job_is_requeued_by_its_id(scontrol: Scontrol) -> None:
    told = scontrol(SLURM_JOB_ID="77")
    assert outside.requeue() == "job 77 is back in Slurm's queue"
    assert told.read_text() == "requeue 77\n"


def test_a_task_of_an_array_is_requeued_alone(scontrol: Scontrol) -> None:
    """Its SLURM_JOB_ID is the whole array's for one of the tasks."""
    told = scontrol(SLURM_JOB_ID="77", SLURM_ARRAY_JOB_ID="77", SLURM_ARRAY_TASK_ID="3")
    assert outside.requeue() == "job 77_3 is back in Slurm's queue"
    assert told.read_text() == "requeue 77_3\n"


def test_why_a_job_cannot_be_requeued_is_told(scontrol: Scontrol, tmp_path: Path) -> None:
    scontrol("Requested operation is presently disabled for job 77", SLURM_JOB_ID="77")
    said = "job 77 could not be requeued: Requested operation is presently disabled for job 77"
    assert outside.requeue() == said
    (tmp_path / "scontrol").unlink()
    assert "job 77 could not be requeued: " in outside.requeue()
    assert "No such file or directory: 'scontrol'" in outside.requeue()


def test_away_from_slurm_nothing_is_requeued(scontrol: Scontrol) -> None:
    told = scontrol()
    assert outside.requeue() == ""
    assert not told.exists()


@pytest.mark.parametrize(
    ("signum", "code", "requeues"),
    [
        (signal.SIGUSR1, 138, True),
        (signal.SIGUSR2, 140, True),
        (signal.SIGTERM, 143, False),
        (signal.SIGINT, 130, False),
    ],
)
def test_a_warning_requeues_and_a_request_to_end_does_not(
    scontrol: Scontrol,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: int,
    code: int,
    requeues: bool,
) -> None:
    def interrupted(words: list[str]) -> int:
        raise Interrupted(signum)

    told = scontrol(SLURM_JOB_ID="77")
    monkeypatch.setattr(verb, "main", interrupted)
    assert main(["env"]) == code
    assert told.exists() == requeues
    assert ("sft_lab: job 77 is back in Slurm's queue" in capsys.readouterr().err) == requeues


class _Met:
    """A meeting whose first process has sent the others to a run, after `before` has happened."""

    group = Group(1, 2, 0, "Slurm", "localhost", 1)

    def __init__(self, run: Path, before: Callable[[], None] = lambda: None):
        self._run, self._before = run, before

    def told(self) -> dict[str, object]:
        self._before()
        return {"run": str(self._run), "each": 1}


@pytest.mark.parametrize(
    ("error", "code"),
    [(Interrupted(signal.SIGUSR1), 0), (Interrupted(signal.SIGTERM), 143), (RunError("the disk is full"), 1)],
    ids=str,
)
def test_a_task_beside_the_first_one_ends_a_warned_run_without_a_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: SftLabError, code: int
) -> None:
    """`srun --kill-on-bad-exit` would end the first one too, which has yet to put the job into the queue."""

    def ends(*_: object) -> None:
        raise error

    monkeypatch.setattr(meetings, "current", lambda: _Met(tmp_path))
    monkeypatch.setattr(worker, "join", ends)
    assert worker.follow() == code


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGUSR1, 0), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_task_that_waits_for_the_first_ones_word_hears_signals_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    monkeypatch.setattr(meetings, "current", lambda: _Met(tmp_path, lambda: signal.raise_signal(signum)))
    assert worker.follow() == code
