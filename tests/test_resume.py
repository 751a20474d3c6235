"""Runs that end too early: killed, interrupted, failed; and how they go on."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from sft_lab import checkpoints, embedded
from sft_lab.runs import RunDirectory
from tests.conftest import Cli, may_mount, online
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


@pytest.mark.parametrize(("mode", "times"), [("online", 3), pytest.param("offline", 5, marks=pytest.mark.slow)])
def test_killed_again_and_again_and_resumed_to_the_same_bytes(
    tmp_path: Path, undisturbed: bytes, wandb_server: FakeWandb, mode: str, times: int
) -> None:
    """SIGKILL at random moments; then the adapter is byte-equal, and W&B has one run with every step once."""
    env = {**online(wandb_server), "WANDB_MODE": mode}
    moments = random.Random(f"kill {mode}")
    process = start([*SIXTY, "hydra.run.dir=run"], tmp_path, env)
    step = 0
    for _ in range(times):
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
    tmp_path: Path, undisturbed: bytes, signum: int, code: int, main: Cli
) -> None:
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path)
    wait_for_step(process, 10)
    assert kill(process, signum) == code
    status = read(tmp_path / "run" / "status.json")
    assert status["state"] == "interrupted"
    assert signal.Signals(signum).name in status["error"]
    saved = checkpoints.newest(RunDirectory(tmp_path / "run"))[0]
    assert saved is not None
    assert int(saved.name.split("-")[1]) == status["step"] >= 10
    assert not (tmp_path / "run" / "adapter").exists()
    refused = check(main("chat", "run", "--prompt", "hi"), code=1)
    assert "no adapter yet" in refused.stderr
    check(main("resume", "run"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed
    again = check(main("resume", "run"))
    assert "nothing to go on with" in again.stdout


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path, main: Cli, undisturbed: bytes) -> None:
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path)
    wait_for_step(process, 22)
    kill(process, signal.SIGKILL)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-21"
    with open(newest / "optimizer.pt", "r+b") as file:
        file.truncate(100)
    resumed = check(main("resume", "run"))
    assert "passed over checkpoint-21: optimizer.pt has 100 bytes" in resumed.stderr
    assert "going on from step 14" in resumed.stdout
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed


def test_a_run_in_use_is_not_resumed(tmp_path: Path, main: Cli) -> None:
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path)
    try:
        wait_for_step(process, 1)
        process.send_signal(signal.SIGSTOP)  # it would be done before the other has started
        assert "in use by another process" in check(main("resume", "run"), code=2).stderr
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


def test_a_checkpoint_of_a_run_that_has_diverged_is_not_gone_on_from(tmp_path: Path, main: Cli) -> None:
    """Where the loss is told seldom, weights are lost long before it shows."""
    words = ["trainer.learning_rate=1e30", "trainer.max_grad_norm=0", "trainer.logging_steps=60", "tracking=none"]
    words += ["trainer.dataloader_num_workers=0"]
    run = [word for word in SIXTY if not word.startswith("trainer.logging_steps")]
    failed = check(main(*run, *words, "hydra.run.dir=run"), code=1)
    assert "weights are not finite at step 7: training has diverged" in failed.stderr
    assert checkpoints.newest(RunDirectory(tmp_path / "run"))[0] is None


def test_killed_after_the_last_step_it_makes_no_other(tmp_path: Path, main: Cli, undisturbed: bytes) -> None:
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path)
    wait_for_step(process, 60)
    while not (tmp_path / "run" / "checkpoints" / "checkpoint-60" / "whole.json").exists():
        assert process.poll() is None
    kill(process, signal.SIGKILL)
    (tmp_path / "run" / "status.json").write_text('{"state": "running"}')  # it may have got to the end after all
    check(main("resume", "run"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed
    assert read(tmp_path / "run" / "result.json")["steps"] == 60
    assert not (tmp_path / "run" / "checkpoints" / "checkpoint-61").exists()


@pytest.mark.slow
def test_a_checkpoint_without_its_optimizer_is_passed_over(tmp_path: Path, cli: Cli, undisturbed: bytes) -> None:
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path)
    wait_for_step(process, 22)
    kill(process, signal.SIGKILL)
    (tmp_path / "run" / "checkpoints" / "checkpoint-21" / "optimizer.pt").unlink()
    resumed = check(cli("resume", "run"))
    assert "passed over checkpoint-21: optimizer.pt is missing" in resumed.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed


def test_what_has_changed_since_is_refused_by_name(tmp_path: Path, cli: Cli, main: Cli) -> None:
    """Config, data and model: named, and nothing touched, until it is allowed."""
    rows = [f'{{"prompt": "say {n}", "completion": "{n} it is"}}' for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    shutil.copytree(embedded.resolve("embedded:tiny_llama"), tmp_path / "base")
    words = [word for word in SIXTY if not word.startswith(("data.train_rows", "model="))]
    words += ["model=from_path", "model.path=base", "data=from_file", "data.path=rows.jsonl", "data.eval_rows=4"]
    words += ["tracking=none", "hydra.run.dir=run"]
    process = start(words, tmp_path)
    wait_for_step(process, 9)
    kill(process, signal.SIGTERM)
    run = RunDirectory(tmp_path / "run")
    config = run.config.read_text()
    before = run.status.read_text()

    run.config.write_text(config.replace("lora_alpha: 16", "lora_alpha: 99").replace("  r: 8\n", "  r: 4\n"))
    refused = check(main("resume", "run"), code=2)
    assert "peft.r: 8 -> 4 : the run began with the first (--allow peft.r goes on nevertheless)" in refused.stderr
    assert "peft.lora_alpha: 16 -> 99" in refused.stderr
    refused = check(main("resume", "run", "--allow", "peft.lora_alpha"), code=2)
    assert "peft.r: 8 -> 4" in refused.stderr
    assert "lora_alpha" not in refused.stderr
    trainer = "  dataloader_num_workers: 2\n  extra: "
    run.config.write_text(config.replace(f"{trainer}{{}}", f"{trainer}{{neftune_noise_alpha: 5}}"))
    assert "trainer.extra.neftune_noise_alpha: None -> 5" in check(main("resume", "run"), code=2).stderr
    assert "no such thing" in check(main("resume", "run", "--allow", "peft.rr"), code=2).stderr
    run.config.write_text(config)

    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, rows[0]]))
    refused = check(main("resume", "run"), code=2)
    assert "the data is not what this run trains on (--allow data goes on nevertheless)" in refused.stderr
    run.config.write_text(config.replace("precision: auto", "precision: fp16"))
    assert "trainer.precision=fp16 : needs a GPU" in check(main("resume", "run"), code=2).stderr
    run.config.write_text(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(10, 9, 1))
        assert "disk_full : checkpoints and adapter need" in check(main("resume", "run"), code=2).stderr

    with open(tmp_path / "base" / "model.safetensors", "r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)[0]
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last ^ 1]))
    refused = check(main("resume", "run", "--allow", "data"), code=2)
    assert "the base model is not what this run started from (--allow model goes on nevertheless)" in refused.stderr
    assert "the data is not" not in refused.stderr

    record = run.provenance.read_text()
    run.provenance.write_text(record.replace('"trainer.precision": "fp32"', '"trainer.precision": "bf16"'))
    refused = check(main("resume", "run", "--allow", "data", "--allow", "model"), code=2)
    assert "trainer.precision: bf16 -> fp32 : the run began with the first" in refused.stderr  # on another machine
    run.provenance.write_text(record)
    assert run.status.read_text() == before

    run.config.write_text(config.replace("save_steps: 7", "save_steps: 20"))  # changes no bit of the result
    resumed = check(cli("resume", "run", "--allow", "data", "--allow", "model"))
    assert resumed.stderr.count("allowed: the result is not that of an undisturbed run") == 2
    assert read(run.status)["state"] == "completed"
    assert sorted(path.name for path in run.checkpoints.glob("checkpoint-*")) == ["checkpoint-40", "checkpoint-60"]


@pytest.mark.skipif(not may_mount(), reason="needs mount namespaces")
def test_a_run_that_cannot_save_never_begins(tmp_path: Path) -> None:
    """A quota on checkpoints/ alone, which no look at the free space tells: found out by saving, before the first step."""
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    words = f"{' '.join(SIXTY)} tracking=none evaluation.before=false hydra.run.dir=run"
    script = f"mount -t tmpfs -o size=100k tmpfs {place}; exec {sys.executable} -m sft_lab {words}"
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    failed = check(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False), code=1)
    assert re.search(r"the disk of .*/checkpoints is full .*no checkpoint was saved yet", failed.stderr)
    assert read(tmp_path / "run" / "status.json")["state"] == "failed"
    assert RunDirectory(tmp_path / "run").read_metrics() == []


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["distributed=ddp", "distributed.num_processes=2"]], ids=["single", "ddp"])
def test_memory_that_runs_out_keeps_the_last_good_checkpoint(
    words: list[str], tmp_path: Path, undisturbed: bytes, cli: Cli
) -> None:
    """In mid-run a limit is put on what the process may have: what torch then raises ends in a sentence."""
    env = {"OMP_NUM_THREADS": "1"}
    rows = ["trainer.per_device_train_batch_size=2"] if words else []
    process = start([*SIXTY, *words, *rows, "tracking=none", "hydra.run.dir=run"], tmp_path, env)
    wait_for_step(process, 16)
    trains = [p for p in psutil.Process(process.pid).children(recursive=True) if "sft_lab.worker" in p.cmdline()]
    for one in trains or [psutil.Process(process.pid)]:
        one.rlimit(psutil.RLIMIT_AS, (1 << 20, psutil.RLIM_INFINITY))
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "sft_lab: out of memory: lower trainer.per_device_train_batch_size" in errors.splitlines()[-1]
    status = read(tmp_path / "run" / "status.json")
    assert status["state"] == "failed"
    assert status["error"].startswith("out of memory")
    kept, passed_over = checkpoints.newest(RunDirectory(tmp_path / "run"))
    assert kept is not None
    assert not passed_over
    check(cli("resume", "run", env=env))
    if not words:
        assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed


@pytest.mark.skipif(not may_mount(), reason="needs mount namespaces")
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, undisturbed: bytes) -> None:
    """The disk fills up in mid-run: a sentence, a true status, and once there is room the same bits."""
    run = tmp_path / "run"
    run.mkdir()
    program = f"{sys.executable} -m sft_lab"
    fill = (
        "while [ ! -f run/checkpoints/checkpoint-14/whole.json ]; do sleep 0.02; done; "
        "dd if=/dev/zero of=run/other bs=1k 2>/dev/null"
    )
    script = (
        f"mount -t tmpfs -o size=8m tmpfs {run}; ({fill}) & {program} {' '.join(SIXTY)} tracking=none hydra.run.dir=run "
        ">first.out 2>first.err; echo $? >first.code; wait; cp run/status.json status.json; rm -f run/other; "
        f"{program} resume run >second.out 2>second.err; echo $? >second.code; cp -r run after"
    )
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    check(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False))
    errors = (tmp_path / "first.err").read_text()
    assert (tmp_path / "first.code").read_text() == "1\n", errors
    assert re.search(
        r"the disk of .* is full \(\d+ bytes are free .*checkpoint-\d+ is whole, and `resume` goes on", errors
    )
    assert "Traceback" not in errors
    status = read(tmp_path / "status.json")
    assert status["state"] == "failed"
    assert "is full" in status["error"]
    assert (tmp_path / "second.code").read_text() == "0\n", (tmp_path / "second.err").read_text()
    assert (tmp_path / "after" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed


@pytest.mark.slow
def test_a_cluster_warns_and_the_run_saves(tmp_path: Path, undisturbed: bytes, cli: Cli) -> None:
    """SIGUSR1, as Slurm sends it before the time is up; the job goes back into the queue."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    process = start([*SIXTY, "tracking=none", "hydra.run.dir=run"], tmp_path, {"SLURM_JOB_ID": "77", "PATH": path})
    wait_for_step(process, 10)
    assert kill(process, signal.SIGUSR1) == 138
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert read(tmp_path / "run" / "status.json")["state"] == "interrupted"
    check(cli("resume", "run"))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == undisturbed


@pytest.mark.slow
def test_a_checkpoint_is_due_by_the_clock_too(tmp_path: Path, cli: Cli) -> None:
    words = [
        "trainer.save_steps=1000",
        "trainer.save_minutes=0.0001",
        "trainer.save_total_limit=100",
        "hydra.run.dir=run",
    ]
    check(cli(*SIXTY, *words, "trainer.max_steps=5", "tracking=none"))
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert saved == [f"checkpoint-{step}" for step in range(1, 6)]
