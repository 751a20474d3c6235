"""Sweeps that are killed, run into each other or fill the disk, and how the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sft_lab import config as configs
from sft_lab.sweep.ledger import trial_name
from tests.conftest import Cli, may_mount
from tests.sweep.test_sweep import UNTRACKED, begun, states, times, trials
from tests.test_run import check, lines, read

pytestmark = pytest.mark.e2e

LONG = [
    "-m",
    *UNTRACKED,
    "sweep.name=s",
    "trainer.max_steps=60",
    "trainer.save_steps=10",
    "peft=lora_r8,lora_r16,lora_r64",
]


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_sweep_that_was_killed_goes_on_where_it_was(cli: Cli, tmp_path: Path, signum: int, code: int) -> None:
    """In its second trial; the first is not touched again, the second goes on from a checkpoint, the third is begun."""
    process = begun(LONG, tmp_path, "trial 2/3")
    assert process.stdout is not None
    next(line for line in process.stdout if re.match(r"step 3\d/", line))
    process.send_signal(signum)
    process.communicate()
    assert process.returncode == code
    first, second, third = trials(tmp_path).values()
    assert not third.exists()
    written = times(first)
    again = check(cli(*LONG))
    assert "3 trials (2 to train, 1 done)" in again.stdout
    assert re.search(r"going on from step [1-5]\d", again.stdout)
    assert states(tmp_path) == ["completed"] * 3
    assert times(first) == written
    steps = [event["step"] for event in lines(second / "metrics.jsonl") if event["split"] == "train"]
    assert steps == list(range(1, 61))


def test_a_killed_process_of_a_trial_costs_that_trial_alone(cli: Cli, tmp_path: Path) -> None:
    words = [*LONG[:-1], "peft=lora_r8,lora_r16", "sweep.isolate=true"]
    process = begun(words, tmp_path, "trial 1/2")
    assert process.stdout is not None
    next(line for line in process.stdout if re.match(r"step 3\d/", line))
    (trial,) = psutil.Process(process.pid).children()
    trial.kill()
    out = process.communicate()[0]
    assert process.returncode == 1
    assert "failed: its process was killed by SIGKILL" in out
    assert states(tmp_path) == ["failed", "completed"]
    again = check(cli(*words))
    assert "going on from step" in again.stdout
    assert states(tmp_path) == ["completed"] * 2


def test_two_sweeps_of_one_name_at_once(main: Cli, tmp_path: Path) -> None:
    endless = [*LONG, "trainer.max_steps=1000000"]
    process = begun(endless, tmp_path, "trial 1/3")
    try:
        second = check(main(*endless), code=2)
        assert f"sweep.name=s : process {process.pid} on " in second.stderr
        assert "is working on it" in second.stderr
    finally:
        process.kill()
        process.communicate()
    assert "3 trials (3 to train, 0 done)" in check(main(*endless, "sweep.dry_run=true")).stdout


@pytest.mark.skipif(not may_mount(), reason="needs mount namespaces")
def test_a_trial_whose_disk_is_full_leaves_the_others_alone(cli: Cli, tmp_path: Path) -> None:
    """Only the second trial's checkpoints lie on a disk of 100 kB; with a larger one the same command completes it."""
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    full = trial_name(configs.to_config(configs.compose([*UNTRACKED, "peft=lora_r16", "trainer.save_steps=2"])))
    small = sweep / full / "checkpoints"
    small.mkdir(parents=True)
    words = ["-m", *UNTRACKED, "trainer.save_steps=2", "sweep.name=s", "peft=lora_r8,lora_r16,lora_r64"]
    script = f"mount -t tmpfs -o size=100k tmpfs {small} && exec {sys.executable} -m sft_lab {' '.join(words)}"
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 1, result.stderr
    assert states(tmp_path) == ["completed", "failed", "completed"]
    assert re.search(rf"{full} failed: the disk of .* is full", result.stdout)
    check(cli(*words))
    assert states(tmp_path) == ["completed"] * 3


@pytest.mark.skipif(not may_mount(), reason="needs mount namespaces")
@pytest.mark.parametrize("files", [pytest.param(5, marks=pytest.mark.slow), 22])
def test_a_sweep_whose_disk_is_full_ends_in_a_sentence_and_goes_on_later(tmp_path: Path, files: int) -> None:
    """The sweep itself lies on a disk with room for some files: its plan fills it, or its first trial; then it grows."""
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    sweep.mkdir(parents=True)
    words = ["-m", *UNTRACKED, "trainer.save_steps=2", "sweep.name=s", "peft=lora_r8,lora_r16"]
    begin = f"{sys.executable} -m sft_lab {' '.join(words)}"
    script = (
        f"mount -t tmpfs -o size=100m,nr_inodes={files} tmpfs {sweep}; {begin} >first.out 2>first.err; echo $? >first.code; "
        f"mount -o remount,size=100m,nr_inodes=10000 tmpfs {sweep}; {begin} >second.out 2>second.err; echo $? >second.code; "
        f"cp -r {sweep} {tmp_path}/after"
    )
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    check(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False))
    out, err = ((tmp_path / f"first.{name}").read_text() for name in ("out", "err"))
    assert (tmp_path / "first.code").read_text() == "1\n", err
    assert "No space left on device" in out + err or " is full (" in out + err
    assert err.splitlines()[-1].startswith("sft_lab: sweep s: ")
    assert "Traceback" not in out + err
    assert (tmp_path / "second.code").read_text() == "0\n", (tmp_path / "second.err").read_text()
    planned = read(tmp_path / "after" / "sweep.json")["trials"]
    assert [read(tmp_path / "after" / t / "status.json")["state"] for t in planned] == ["completed"] * 2
    assert (tmp_path / "after" / "report.html").is_file()
