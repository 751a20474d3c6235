"""How the ranks of a run end, and what who started them makes of it, without starting any."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_lab import agent, outside, worker
from sft_lab.callbacks import Stop
from sft_lab.errors import RunError
from sft_lab.meetings import Meeting
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that trains."""
    found = RunDirectory(tmp_path)
    found.set_status("running")
    return found


def joined(index: int) -> Meeting:
    from torch.distributed import HashStore

    return Meeting(outside.Group(index, 2, 0, "Slurm", "localhost", 0, nodes=2), HashStore())


@pytest.mark.parametrize(
    ("each", "error", "told"),
    [
        pytest.param(1, ValueError("unforeseen"), "process 1 failed: ValueError: unforeseen", id="a rank"),
        pytest.param(1, RunError("loss is nan"), "loss is nan", id="a rank that knows why"),
        pytest.param(
            8, RunError("rank 9 was killed by SIGKILL"), "rank 9 was killed by SIGKILL", id="a node that starts its ranks"
        ),
    ],
)  # fmt: skip
def test_the_first_process_learns_what_another_failed_of(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, each: int, error: Exception, told: str
) -> None:
    """It has only seen that a connection is closed."""
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setattr(worker, "_made_ready", lambda *_: Config())

    def fails(with_: Exception) -> None:
        def end(*_: object) -> None:
            raise with_

        monkeypatch.setattr(agent, "run", end)
        monkeypatch.setattr(worker, "take_part", end)

    fails(error)
    with pytest.raises(type(error)):
        worker.join(joined(1), run, each, Stop())
    fails(RuntimeError("Connection closed by peer"))
    with pytest.raises(RunError) as caught:
        worker.join(joined(0), run, each, Stop())
    assert str(caught.value) == told


def test_ranks_of_a_complete_run_are_not_started_again(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "take_part", lambda *_: pytest.fail("it trains"))
    run.set_status("completed")
    assert worker._work(run) == 0


@pytest.mark.parametrize("state", ["running", "completed"])
def test_what_fails_after_the_end_fails_no_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """Ranks that leave each other, say, when one has gone already."""

    def end() -> None:
        run.set_status(state)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("RANK", "0")
    for name, nothing in {"sft_lab.config.load": Config(), "sft_lab.data.prepared.Prepared.load": None}.items():
        monkeypatch.setattr(name, lambda *_, nothing=nothing: nothing)
    monkeypatch.setattr("sft_lab.ranks.begin", lambda *_: None)
    monkeypatch.setattr("sft_lab.train.run", lambda *_: None)
    monkeypatch.setattr("sft_lab.ranks.end", end)
    if state == "completed":
        assert worker._work(run) == 0
        assert "rank 0, after the run was complete: Connection closed by peer" in run.log.read_text()
    else:
        with pytest.raises(RuntimeError):
            worker._work(run)
