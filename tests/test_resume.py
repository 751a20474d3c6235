"""Runs that end too early: killed, interrupted, failed; and how they go on."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_lab.runs import RunDirectory
from tests.conftest import Cli, online
from tests.fake_wandb import FakeWandb
from tests.test_run import check, lines, read

pytestmark = pytest.mark.e2e

SIXTY = [
    "model=tiny_llama", "peft=lora_r8", "peft.lora_dropout=0.1", "trainer.max_steps=60", "trainer.packing=false",
    "trainer.gradient_accumulation_steps=2", "trainer.per_device_train_batch_size=4", "trainer.dataloader_num_workers=2",
    "trainer.save_steps=7", "trainer.logging_steps=1", "data.train_rows=200", "data.eval_rows=4", "evaluation.rows=2",
    "evaluation.max_new_tokens=4",
]  # fmt: skip


def start(words: list[str], cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sft_lab", *words],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Returns once the terminal has shown `step`; the process goes on."""
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"step (\d+)/", line)
        if found and int(found[1]) >= step:
            return
    raise AssertionError(f"ended before step {step}: {process.communicate()[1]}")


def kill(process: subprocess.Popen[str], signum: int) -> int:
    """Signals the process alone for SIGINT and SIGTERM, it and its children for SIGKILL."""
    if signum == signal.SIGKILL:
        os.killpg(process.pid, signum)
    else:
        process.send_signal(signum)
    process.communicate()
    return process.returncode


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "sft_lab", *SIXTY, "tracking=none", "hydra.run.dir=run"]
    check(subprocess.run(command, cwd=path, capture_output=True, text=True, check=False))
    return (path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["online", pytest.param("offline", marks=pytest.mark.slow)])
def test_killed_five_times_and_resumed_to_the_same_bytes(
    tmp_path: Path, undisturbed: bytes, wandb_server: FakeWandb, mode: str
) -> None:
    """SIGKILL at random moments; then the adapter is byte-equal, and W&B has one run with every step once."""
    env = {**online(wandb_server), "WANDB_MODE": mode}
    moments = random.Random(f"kill {mode}")
    process = start([*SIXTY, "hydra.run.dir=run"], tmp_path, env)
    step = 0
    for _ in range(5):
        step += moments.randint(3, 10)
        wait_for_step(process, step)
        time.sleep(moments.random() / 50)  # anywhere in the step, not to wait for anything
        kill(process, signal.SIGKILL)
        assert read(tmp_path / "run" / "status.json")["state"] == "running"
        process = start(["resume", "run"], tmp_path, env)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    run = RunDirectory(tmp_path / "run")
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == undisturbed
    steps = [event["step"] for event in run.read_metrics() if event["split"] == "train"]
    assert steps == list(range(1, 61))
    if mode == "offline":
        sync = [sys.executable, "-m", "wandb", "sync", str(run.wandb)]
        subprocess.run(sync, env={**os.environ, **online(wandb_server)}, check=True, capture_output=True, timeout=120)
    (tracked,) = wandb_server.runs.values()
    assert tracked.steps == sorted(set(tracked.steps))
    assert set(range(1, 61)) <= set(tracked.steps)
    assert tracked.exit_code == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_resume_goes_on(
    tmp_path: Path, undisturbed: bytes, signum: int, code: int, cli: Cli
) -> None:
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path)
    wait_for_step(process, 10)
    assert kill(process, signum) == code
    status = read(tmp_path / "run" / "status.json")
    assert status["state"] == "interrupted"
    assert signal.Signals(signum).name in status["error"]
    saved = RunDirectory(tmp_path / "run").newest_checkpoint()[0]
    assert saved is not None
    assert int(saved.name.split("-")[1]) == status["step"] >= 10
    assert not (tmp_path / "run" / "adapter").exists()
    refused = check(cli("chat", "run", "--prompt", "hi"), code=1)
    assert "no adapter yet" in refused.stderr
    check(cli("resume", "run"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed
    again = check(cli("resume", "run"))
    assert "nothing to go on with" in again.stdout


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, cli: Cli, undisturbed: bytes) -> None:
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path)
    wait_for_step(process, 22)
    kill(process, signal.SIGKILL)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-21"
    with open(newest / "optimizer.pt", "r+b") as file:
        file.truncate(100)
    resumed = check(cli("resume", "run"))
    assert "passed over checkpoint-21: optimizer.pt has 100 bytes" in resumed.stderr
    assert "going on from step 14" in resumed.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed


def test_a_run_in_use_is_not_resumed(tmp_path: Path, cli: Cli) -> None:
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path)
    try:
        wait_for_step(process, 1)
        process.send_signal(signal.SIGSTOP)  # it would be done before the other has started
        assert "in use by another process" in check(cli("resume", "run"), code=2).stderr
    finally:
        kill(process, signal.SIGKILL)


def test_a_diverging_run_fails_and_says_so(tmp_path: Path, cli: Cli) -> None:
    words = ["trainer.learning_rate=1e30", "trainer.max_grad_norm=0", "hydra.run.dir=run"]
    failed = check(cli(*SIXTY, *words), code=1)
    assert "diverged" in failed.stderr
    assert "trainer.learning_rate" in failed.stderr
    assert "Traceback" not in failed.stderr
    status = read(tmp_path / "run" / "status.json")
    assert status["state"] == "failed"
    assert "diverged" in status["error"]
    assert not (tmp_path / "run" / "adapter").exists()
    assert lines(tmp_path / "run" / "metrics.jsonl")


def test_killed_after_the_last_step_it_makes_no_other(tmp_path: Path, cli: Cli, undisturbed: bytes) -> None:
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path)
    wait_for_step(process, 60)
    while not (tmp_path / "run" / "checkpoints" / "checkpoint-60" / "whole.json").exists():
        assert process.poll() is None
    kill(process, signal.SIGKILL)
    (tmp_path / "run" / "status.json").write_text('{"state": "running"}')  # it may have got to the end after all
    check(cli("resume", "run"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed
    assert read(tmp_path / "run" / "result.json")["steps"] == 60
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-61").exists()
