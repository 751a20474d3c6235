"""Ranks that are killed, interrupted, or fail: nothing is lost, and the status is true."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sft_lab import checkpoints
from sft_lab.runs import RunDirectory
from tests.conftest import Cli, online
from tests.distributed.starting import adapter, environment
from tests.fake_wandb import FakeWandb
from tests.test_resume import SIXTY, kill, start, wait_for_step
from tests.test_run import check, read

pytestmark = pytest.mark.e2e
PACKED = [*SIXTY, "trainer.packing=true", "trainer.max_length=256", "trainer.per_device_train_batch_size=1"]
TWO = [*PACKED, "tracking=none", "distributed=ddp", "distributed.num_processes=2", "hydra.run.dir=run"]


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks that a command has started, in their order."""
    found = [p for p in psutil.Process(process.pid).children() if "sft_lab.worker" in p.cmdline()]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "sft_lab", *TWO]
    done = subprocess.run(
        command, cwd=path, env={**os.environ, **environment()}, capture_output=True, text=True, check=False
    )
    check(done)
    return adapter(path / "run")


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(
    rank: int, tmp_path: Path, undisturbed: bytes, wandb_server: FakeWandb
) -> None:
    words = [word for word in TWO if word != "tracking=none"]
    process = start([*words, "distributed.max_restarts=1"], tmp_path, {**online(wandb_server), **environment()})
    wait_for_step(process, 23)
    ranks_of(process)[rank].kill()
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "going on from step 21" in output
    assert "a rank has died, and all were started again (1 of 1 times)" in errors
    assert adapter(tmp_path / "run") == undisturbed
    run = RunDirectory(tmp_path / "run")
    assert [event["step"] for event in run.read_metrics() if event["split"] == "train"] == list(range(1, 61))
    (tracked,) = wandb_server.runs.values()
    assert tracked.steps == sorted(set(tracked.steps))
    assert set(range(1, 61)) <= set(tracked.steps)
    assert tracked.exit_code == 0


@pytest.mark.slow
def test_a_killed_rank_without_restarts_is_told_and_resumed(tmp_path: Path, undisturbed: bytes, cli: Cli) -> None:
    process = start(TWO, tmp_path, environment())
    wait_for_step(process, 9)
    ranks_of(process)[1].kill()
    output, errors = process.communicate()
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "sft_lab: rank 1 was killed by SIGKILL"
    assert re.search(r"`python -m sft_lab resume \S*/run` goes on", output)
    status = read(tmp_path / "run" / "status.json")
    assert (status["state"], status["error"]) == ("failed", "rank 1 was killed by SIGKILL")
    check(cli("resume", "run", env=environment()))
    assert adapter(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("restarts", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_killed_before_the_first_step_is_told_too(restarts: int, tmp_path: Path, undisturbed: bytes) -> None:
    """While all load the model, as when the memory is not enough for it; the others are ended, which is no signal of the
    user's."""
    process = start([*TWO, f"distributed.max_restarts={restarts}"], tmp_path, environment())
    assert process.stdout is not None
    next(line for line in process.stdout if "precision" in line)
    ranks_of(process)[1].kill()
    _, errors = process.communicate()
    status = read(tmp_path / "run" / "status.json")
    if restarts:
        assert process.returncode == 0, errors
        assert adapter(tmp_path / "run") == undisturbed
    else:
        assert process.returncode == 1, errors
        assert errors.splitlines()[-1] == "sft_lab: rank 1 was killed by SIGKILL"
        assert (status["state"], status["error"]) == ("failed", "rank 1 was killed by SIGKILL")


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_signal_saves_on_all_ranks(signum: int, code: int, tmp_path: Path, undisturbed: bytes, cli: Cli) -> None:
    process = start([*TWO, "distributed.max_restarts=1"], tmp_path, environment())
    wait_for_step(process, 10)
    ranks = ranks_of(process)
    assert kill(process, signum) == code
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    status = read(tmp_path / "run" / "status.json")
    assert status["state"] == "interrupted"
    saved, passed_over = checkpoints.newest(RunDirectory(tmp_path / "run"))
    assert saved is not None
    assert not passed_over
    assert int(saved.name.split("-")[1]) == status["step"] >= 10
    check(cli("resume", "run", env=environment()))
    assert adapter(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_ranks_die_with_the_command_that_started_them(tmp_path: Path, undisturbed: bytes, cli: Cli) -> None:
    process = start(TWO, tmp_path, environment())
    wait_for_step(process, 16)
    ranks = ranks_of(process)
    process.kill()  # it alone: nobody tells the ranks
    process.communicate()
    psutil.wait_procs(ranks, timeout=20)
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    check(cli("resume", "run", env=environment()))
    assert adapter(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_what_fails_the_same_way_again_is_not_started_again(tmp_path: Path, cli: Cli) -> None:
    words = ["distributed.max_restarts=3", "trainer.learning_rate=1e30", "trainer.max_grad_norm=0"]
    failed = check(cli(*TWO, *words, env=environment()), code=1)
    assert "training has diverged" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stdout.count("distributed: 2 ranks") == 1
    assert "diverged" in read(tmp_path / "run" / "status.json")["error"]


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [0, 1])
def test_a_run_that_is_complete_stays_so_whatever_becomes_of_a_rank(restarts: int, tmp_path: Path, cli: Cli) -> None:
    words = [*TWO, "trainer.max_steps=4", f"distributed.max_restarts={restarts}"]
    done = check(cli(*words, env=environment("second_rank_dies_last")))
    assert done.stdout.count("distributed: 2 ranks") == 1
    status = read(tmp_path / "run" / "status.json")
    assert (status["state"], status["error"], status["step"]) == ("completed", None, 4)
    assert ("rank 1 was killed by SIGKILL, after the run was complete" in done.stderr) == (not restarts)


@pytest.mark.slow
def test_a_second_signal_waits_for_nobody(tmp_path: Path, undisturbed: bytes, cli: Cli) -> None:
    """A rank that hangs never comes to the end of its step: who asks twice wants the end at once."""
    process = start(TWO, tmp_path, environment())
    wait_for_step(process, 16)
    ranks = ranks_of(process)
    ranks[1].suspend()
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    assert kill(process, signal.SIGTERM) == 143
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    assert read(tmp_path / "run" / "status.json")["state"] == "interrupted"
    check(cli("resume", "run", env=environment()))
    assert adapter(tmp_path / "run") == undisturbed


WAYS = {  # who is killed, and how
    "single": (["distributed=single"], signal.SIGKILL),
    "single, asked to stop": (["distributed=single"], signal.SIGTERM),
    "ddp": (["distributed=ddp", "distributed.num_processes=2"], signal.SIGKILL),
    "ddp, one rank": (
        ["distributed=ddp", "distributed.num_processes=2", "distributed.max_restarts=10"],
        signal.SIGKILL,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_ten_random_moments(way: str, tmp_path: Path, wandb_server: FakeWandb) -> None:
    """Packing, dropout, accumulation 2, two workers; between saves, while one is written, and just after it."""
    words, signum = WAYS[way]
    command = [*PACKED, "trainer.logging_steps=2", "hydra.run.dir=run", *words]
    check(finished(start([*command, "tracking=none"], tmp_path, environment())))
    whole, run = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "run")
    run.path.rename(whole.path)
    env, draw = {**online(wandb_server), **environment()}, random.Random(f"ten {way}")
    since, process = time.time(), start(command, tmp_path, env)
    torn, saving = 0, 1 if signum == signal.SIGTERM else 3  # each that is asked to stop has come further for good
    for moment in draw.sample(["between"] * (10 - 2 * saving) + ["in"] * saving + ["after"] * saving, 10):
        if "one rank" in way:
            wait_for_line(process, "distributed: 2 ranks")
            since = time.time()
        await_moment(moment, process, run, draw.randint(1, 2 * saving), since)
        time.sleep(draw.random() / 50 if moment == "between" else 0)  # anywhere in the step, not to wait for anything
        if "one rank" in way:
            draw.choice(ranks_of(process)).kill()
            continue
        code = kill(process, signum)
        torn += bool(checkpoints.newest(run)[1])
        state = read(run.status)["state"]
        assert (code, state) == ((143, "interrupted") if signum == signal.SIGTERM else (-signal.SIGKILL, "running"))
        since, process = time.time(), start(["resume", "run"], tmp_path, env)
    check(finished(process))
    if way in ("single", "ddp"):
        assert torn >= 1  # of three that were to be: all of a checkpoint may be there by the time of the kill
    assert adapter(run.path) == adapter(whole.path)
    assert logged(run) == logged(whole)
    (tracked,) = wandb_server.runs.values()
    assert tracked.steps == sorted(set(tracked.steps))
    assert {step for step, _ in logged(run)} <= set(tracked.steps)
    assert tracked.exit_code == 0


def await_moment(moment: str, process: subprocess.Popen[str], run: RunDirectory, steps: int, since: float) -> None:
    """Returns so many steps after the newest checkpoint, or while the next one is being made, or once it is.

    Args:
        since: when the process began; what is older is torn, and it will take it away.
    """
    saved, _ = checkpoints.newest(run)
    step = checkpoints.step_of(saved) if saved else 0
    if moment == "between":
        wait_for_step(process, step + steps)
        return
    following = next(n for n in range(step + 1, step + 8) if n % 7 == 0)
    file = checkpoints.at(run, following) / ("adapter_model.safetensors" if moment == "in" else "whole.json")
    while not is_newer(file, since):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.0005)


def is_newer(file: Path, since: float) -> bool:
    try:
        return file.stat().st_mtime > since
    except FileNotFoundError:
        return False


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    assert any(text in line for line in process.stdout), process.communicate()[1]


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def logged(run: RunDirectory) -> list[tuple[int, list[float]]]:
    """What training logged of itself, but for times."""
    kept = ("loss", "grad_norm", "learning_rate", "epoch", "tokens", "entropy", "mean_token_accuracy")
    return [(event["step"], [event[key] for key in kept]) for event in run.read_metrics() if event["split"] == "train"]
