"""A sweep as a job array of a real Slurm, whose jobs are lost in every way there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.sweep.test_sweep import UNTRACKED, states, times, trials
from tests.test_run import check, read

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.skipif(
        not shutil.which("sbatch") and not (os.geteuid() == 0 and shutil.which("apt-get")),
        reason="no Slurm, and none can be installed",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a Slurm"),
]
SCRIPT = ROOT / "tests" / "cluster" / "slurm.sh"
WORDS = [
    "-m", *UNTRACKED, "sweep.name=s", "peft=lora_r8", "trainer.learning_rate=1e-3,1e30,2e-3,3e-3",
    "trainer.max_grad_norm=0", "hydra/launcher=slurm", "hydra.launcher.partition=debug",
]  # fmt: skip
PATIENCE_S = 300


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find a cluster of this module's own."""
    pytest.importorskip("submitit")
    folder = tempfile.mkdtemp(prefix="slurm.", dir="/tmp")  # a socket's path must be short
    env = {**os.environ, "SLURM_TEST_PORT": str(17000 + 3 * (os.getpid() % 5000)), "OMP_NUM_THREADS": "1"}
    cluster = {**env, "SLURM_CONF": f"{folder}/slurm.conf"}
    try:
        subprocess.run([SCRIPT, "start", folder], env=env, check=True, stdout=subprocess.DEVNULL, timeout=PATIENCE_S)
        yield cluster
    finally:  # where a test has failed, the queue first, or a job that waits takes the place of one that is killed
        subprocess.run(["scancel", "--me", "--state=PENDING"], env=cluster, check=False)
        subprocess.run([SCRIPT, "stop", folder], env=env, check=False)
        shutil.rmtree(folder)


def job(env: dict[str, str], index: int, state: str) -> str:
    """The id of an array's task, once it is in that state."""
    command = ["squeue", "--me", "--array", "--noheader", "--format=%i %K %T"]
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        listed = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
        for line in listed.splitlines():
            found, task, now = line.split()
            if task == str(index) and now == state:
                return found
        time.sleep(0.2)
    raise AssertionError(f"task {index} was never {state}: {listed}")


def test_lost_jobs_end_neither_the_others_nor_the_sweep_and_the_same_command_goes_on(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    """The first is killed before it could say a word, the second diverges, the fourth is cancelled in the queue."""
    one_at_a_time = [sys.executable, "-m", "sft_lab", *WORDS, "hydra.launcher.array_parallelism=1"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(one_at_a_time, cwd=tmp_path, env=slurm, stdout=pipe, stderr=pipe, text=True)
    try:
        subprocess.run(["scancel", job(slurm, 3, "PENDING")], env=slurm, check=True)
        subprocess.run(["scancel", "--full", "--signal=KILL", job(slurm, 0, "RUNNING")], env=slurm, check=True)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 1, out + err
    now = states(tmp_path)
    assert now[1:] == ["failed", "completed", "new"], out + err
    assert now[0] in ("new", "failed")  # by how far it had come
    assert f"{now.count('failed')} of 4 trials failed, {now.count('new')} of 4 are not done yet" in err
    for trial in trials(tmp_path).values():
        assert trial.name in out
    assert "CANCELLED" in out + err

    kept = trials(tmp_path)["trainer.learning_rate=0.002"]
    before = times(kept)
    again = subprocess.run(
        [sys.executable, "-m", "sft_lab", *WORDS],
        cwd=tmp_path,
        env=slurm,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    check(again, code=1)
    assert "4 trials (3 to train, 1 done)" in again.stdout
    assert states(tmp_path) == ["completed", "failed", "completed", "completed"]
    assert "1 of 4 trials failed" in again.stderr
    assert times(kept) == before
    failed = trials(tmp_path)["trainer.learning_rate=1e+30"]
    assert "loss is nan" in read(failed / "status.json")["error"]
