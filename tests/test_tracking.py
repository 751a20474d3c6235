"""Tracking, by the real W&B client against a server in this process."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from sft_lab import wandb_file
from sft_lab.errors import ConfigError, RunError
from sft_lab.runs import RunDirectory
from sft_lab.schema import TrackingConfig
from sft_lab.tracking import Tracker, flatten_event, open_tracker
from sft_lab.wandb_run import WandbTracker
from tests.fake_wandb import FakeWandb, Run

ROOT = Path(__file__).parent.parent
RESOLVED = {"seed": 3, "peft": {"r": 16}}


@pytest.fixture(autouse=True)
def fresh_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client that knows nothing of this machine's keys and settings, nor of the test before."""
    for name in os.environ:
        if name.startswith(("WANDB_", "XDG_")):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(home)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    with FakeWandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", server.api_key)
        yield server


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return new_run(tmp_path / "runs" / "first")


def new_run(path: Path) -> RunDirectory:
    path.mkdir(parents=True)
    return RunDirectory(path)


def config(**changes: Any) -> TrackingConfig:
    return TrackingConfig(**{"project": "p", "init_timeout_s": 2, "finish_timeout_s": 5} | changes)


def event(step: int) -> dict[str, Any]:
    return {"step": step, "split": "train", "loss": 1 / step}


def log(tracker: Tracker, run: RunDirectory, steps: range) -> None:
    """What the training does with its events."""
    for step in steps:
        run.append_metrics(event(step))
        tracker.log(flatten_event(event(step)), step=step)


def sync(command: str) -> None:
    """Run the command that a message ends with."""
    program, *arguments = shlex.split(command[command.index("wandb sync") :])
    subprocess.run([sys.executable, "-m", program, *arguments], check=True, capture_output=True, timeout=60)


def only_run(server: FakeWandb) -> Run:
    (run,) = server.runs.values()
    return run


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_everything_of_a_run_arrives(mode: str, server: FakeWandb, run: RunDirectory, tmp_path: Path) -> None:
    settings = config(mode=mode, group="sweep-7", job_type="sft", tags=["a", "b" * 70], notes="why")
    tracker = open_tracker(settings, run, RESOLVED)
    tracker.log({"train/loss": 2.0}, step=5)
    tracker.log({"eval/loss": 3.0}, step=5)
    tracker.log({"train/loss": 1.0}, step=10)
    tracker.table("samples", ["prompt", "answer"], [["2+2", "4"]], step=10)
    tracker.summary({"exact_match": 0.5})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "weights.safetensors").write_bytes(b"w" * 100)
    tracker.log_adapter(adapter, "first/run: lora", {"r": 16})
    tracker.finish(0)
    if mode == "offline":
        assert server.runs == {}
        sync(tracker.message)
    else:
        assert tracker.message.startswith(f"W&B online: {server.url}")

    seen = only_run(server)
    assert seen.config["sft_lab"] == {"value": RESOLVED}
    assert (seen.name, seen.group, seen.job_type) == ("first", "sweep-7", "sft")
    assert (seen.tags, seen.notes) == (["a", "b" * 64], "why")
    assert seen.steps == [5, 10]
    assert (seen.history[0]["train/loss"], seen.history[0]["eval/loss"]) == (2.0, 3.0)
    assert seen.history[1]["samples"]["_type"] == "table-file"
    assert (seen.summary["exact_match"], seen.exit_code) == (0.5, 0)
    (model,) = [artifact for artifact in server.artifacts.values() if artifact.type == "model"]
    assert (model.name, model.metadata, model.committed) == ("first-run-lora", {"r": 16}, True)
    assert model.files == ["weights.safetensors"]


def test_files_land_in_the_run_directory(run: RunDirectory, tmp_path: Path) -> None:
    open_tracker(config(mode="offline"), run, RESOLVED).finish(0)
    assert [path.name for path in run.path.iterdir()] == ["wandb"]
    assert list((tmp_path / "home").glob("wandb")) == []


def test_nothing_is_printed(server: FakeWandb, run: RunDirectory, capfd: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(config(), run, RESOLVED)
    log(tracker, run, range(1, 4))
    tracker.finish(1)
    wandb.teardown()
    assert capfd.readouterr() == ("", "")


def test_method_none_and_disabled_track_nothing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    off = open_tracker(config(method="none"), run, RESOLVED)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    disabled = open_tracker(config(), run, RESOLVED)
    for tracker in (off, disabled):
        assert type(tracker) is Tracker
        tracker.log({"train/loss": 1.0}, step=1)
        tracker.finish(0)
    assert "tracking.method=none" in off.message
    assert "WANDB_MODE=disabled" in disabled.message
    assert not run.wandb.exists()


def test_the_mode_of_the_environment_is_honoured_by_auto_alone(
    server: FakeWandb, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    auto = open_tracker(config(), run, RESOLVED)
    auto.finish(0)
    assert "W&B offline, WANDB_MODE=offline" in auto.message
    assert server.runs == {}

    online = open_tracker(config(mode="online"), new_run(tmp_path / "second"), RESOLVED)
    online.finish(0)
    assert only_run(server).name == "second"


def test_a_key_in_netrc_is_found(
    server: FakeWandb, run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    host = server.url.removeprefix("http://")
    (tmp_path / "home" / ".netrc").write_text(f"machine {host} login user password {server.api_key}\n")
    open_tracker(config(), run, RESOLVED).finish(0)
    assert only_run(server).exit_code == 0


# Where the server cannot be used: each arranges its problem and gives a part of what the message says of it.


def no_key(server: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("WANDB_API_KEY")
    return "there is no API key"


def malformed_key(server: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    return "WANDB_API_KEY invalid"


def wrong_key(server: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_API_KEY", "w" * 40)
    return "refuses the API key"


def refused_connection(server: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> str:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    return "gave no answer within 2 s"


SILENT = socket.create_server(("127.0.0.1", 0))  # the system accepts for it, and nobody ever reads


def silence(server: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{SILENT.getsockname()[1]}")
    return "gave no answer within 2 s"


def outage(server: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> str:
    server.fail_with = 500
    return "gave no answer within 2 s"


KEY_PROBLEMS = [no_key, malformed_key, wrong_key]
SERVER_PROBLEMS = [refused_connection, silence, outage]


@pytest.mark.parametrize("problem", KEY_PROBLEMS + SERVER_PROBLEMS)
def test_auto_goes_offline(
    problem: Callable[..., str], server: FakeWandb, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = problem(server, monkeypatch)
    tracker = open_tracker(config(), run, RESOLVED)
    log(tracker, run, range(1, 4))
    tracker.finish(0)
    assert tracker.message.startswith("W&B offline, ")
    assert why in tracker.message
    assert tracker.message.endswith(f"wandb sync {run.wandb}")
    wandb.teardown()  # the client writes the last of the log after finish has returned
    assert wandb_file.last_step(run.wandb) == 3
    assert len(list(run.wandb.glob("*run-*/*.wandb"))) == 1  # of the attempt nothing is left


@pytest.mark.parametrize("problem", KEY_PROBLEMS)
def test_online_needs_a_key(
    problem: Callable[..., str], server: FakeWandb, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = problem(server, monkeypatch)
    with pytest.raises(ConfigError, match=f"^tracking.mode=online, but .*{why}"):
        open_tracker(config(mode="online"), run, RESOLVED)


def test_online_needs_a_server(server: FakeWandb, run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    why = refused_connection(server, monkeypatch)
    with pytest.raises(RunError, match=f"^tracking.mode=online, but http://127.0.0.1.*{why}"):
        open_tracker(config(mode="online"), run, RESOLVED)


def test_an_outage_neither_hangs_the_end_nor_stops_the_next_run(
    server: FakeWandb, run: RunDirectory, tmp_path: Path
) -> None:
    tracker = open_tracker(config(finish_timeout_s=1), run, RESOLVED)
    server.fail_with = 500
    log(tracker, run, range(1, 11))
    tracker.finish(0)
    assert "W&B upload not complete after 1 s" in tracker.message
    server.fail_with = 0
    second = open_tracker(config(), new_run(tmp_path / "second"), RESOLVED)
    log(second, run, range(1, 4))
    second.finish(0)
    assert second.message.startswith("W&B online")
    assert {run.name: (run.steps, run.exit_code) for run in server.runs.values()} == {
        "first": ([], None),
        "second": ([1, 2, 3], 0),
    }

    sync(tracker.message)
    (first,) = [run for run in server.runs.values() if run.name == "first"]
    assert first.steps == list(range(1, 11))


@pytest.mark.slow  # the client asks an unreachable server for 10 s
def test_an_outage_when_the_adapter_is_logged_is_a_warning(
    server: FakeWandb, run: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(config(finish_timeout_s=1), run, RESOLVED)
    server.fail_with = 500
    (tmp_path / "adapter").mkdir()
    tracker.log_adapter(tmp_path / "adapter", "first", {})
    tracker.finish(0)
    assert f"W&B has no record of the adapter, which is in {tmp_path / 'adapter'}" in caplog.text


def test_runs_of_one_process_are_runs_of_their_own(server: FakeWandb, tmp_path: Path) -> None:
    for name, exit_code in {"bad": 1, "good": 0}.items():
        tracker = open_tracker(config(), new_run(tmp_path / name), RESOLVED)
        tracker.log({"train/loss": 1.0}, step=1)
        tracker.finish(exit_code)
        tracker.finish(0)  # the first call counts
    assert [(run.name, run.exit_code, run.steps) for run in server.runs.values()] == [("bad", 1, [1]), ("good", 0, [1])]


@pytest.mark.e2e
@pytest.mark.parametrize("interval_s", ["1", "15"])  # most of it is uploaded when the process is killed; nothing is
def test_a_killed_online_run_resumes_without_a_hole(
    interval_s: str, server: FakeWandb, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", interval_s)
    log_and_die(run, "online", lambda: interval_s == "15" or len(only_run(server).history) >= 19)
    resume(run, "online")
    seen = only_run(server)
    assert seen.steps == list(range(1, 31))
    assert seen.exit_code == 0


def test_a_torn_log_does_not_keep_the_rest_from_being_uploaded(server: FakeWandb, run: RunDirectory) -> None:
    log(open_tracker(config(mode="offline"), run, RESOLVED), run, range(1, 21))
    wandb.teardown()
    (torn,) = run.wandb.glob("offline-run-*/*.wandb")
    os.truncate(torn, torn.stat().st_size // 2)
    tracker = resume(run, "offline")
    sync(tracker.message)
    assert only_run(server).steps == list(range(1, 31))


@pytest.mark.e2e
@pytest.mark.parametrize("interval_s", ["0.1", "15"])  # as above, of the log on disk
def test_a_killed_offline_run_resumes_without_a_hole(
    interval_s: str, server: FakeWandb, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", interval_s)
    log_and_die(run, "offline", lambda: interval_s == "15" or wandb_file.last_step(run.wandb) >= 19)
    tracker = resume(run, "offline")
    sync(tracker.message)
    seen = only_run(server)
    assert seen.steps == list(range(1, 31))
    assert seen.exit_code == 0


LOG_AND_WAIT = """
import pathlib, signal, sys
from tests import test_tracking as t
run = t.RunDirectory(sys.argv[1])
t.log(t.open_tracker(t.config(mode=sys.argv[2]), run, t.RESOLVED), run, range(1, 21))
print("logged", flush=True)
signal.pause()
"""


def log_and_die(run: RunDirectory, mode: str, arrived: Callable[[], bool]) -> None:
    """Log steps 1 to 20 in a process that is killed, and the client's service with it, once they `arrived`."""
    command = [sys.executable, "-c", LOG_AND_WAIT, str(run.path), mode]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
        deadline = time.monotonic() + 30
        while not arrived() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert arrived()
        service = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in service:
            child.kill()
        psutil.wait_procs(service)


def resume(run: RunDirectory, mode: str) -> Tracker:
    """Go on from a checkpoint at step 15 to the end at 30."""
    run.rewind_metrics(15)
    tracker = open_tracker(config(mode=mode), run, RESOLVED)
    assert isinstance(tracker, WandbTracker)
    log(tracker, run, range(16, 31))
    tracker.finish(0)
    return tracker


def test_a_log_cut_anywhere_is_read_up_to_the_cut_and_repaired(run: RunDirectory) -> None:
    tracker = open_tracker(config(mode="offline"), run, RESOLVED)
    for step in range(1, 301):  # more than two blocks of 32 KiB
        tracker.log({f"metric_{n}": step / 7 for n in range(8)}, step=step)
    tracker.finish(0)
    wandb.teardown()  # else its service goes on writing to the log for a moment
    log_file = next(run.wandb.glob("offline-run-*/*.wandb"))
    data = log_file.read_bytes()
    assert len(data) > 2 * 32768
    seen = []
    for size in (*range(0, len(data), 997), len(data)):
        log_file.write_bytes(data[:size])
        seen.append(wandb_file.last_step(run.wandb))
        wandb_file.repair_torn_logs(run.wandb)
        assert wandb_file.last_step(run.wandb) == seen[-1]
        repaired = log_file.read_bytes() if log_file.exists() else b""
        assert data[:size].startswith(repaired)
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (-1, 300)
