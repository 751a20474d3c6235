"""A sweep as a job array of a real Slurm, whose jobs are lost in every way there is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.distributed.starting import TWENTY, adapter, environment
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


def test_ctrl_c_leaves_the_jobs_to_slurm_and_says_how_to_end_them(slurm: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sft_lab", *(word for word in WORDS if "=1e-3" not in word)]
    command += ["trainer.learning_rate=1e-3,2e-3", "hydra.launcher.array_parallelism=1"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, env=slurm, stdout=pipe, stderr=pipe, text=True)
    try:
        array = job(slurm, 0, "RUNNING").partition("_")[0]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 130, out + err
    assert f"the jobs stay with Slurm, and go on without this command; scancel {array} ends them" in out
    assert job(slurm, 1, "PENDING")
    subprocess.run(["scancel", array], env=slurm, check=True)
    check(subprocess.run(command, cwd=tmp_path, env=slurm, capture_output=True, text=True, timeout=PATIENCE_S))
    assert states(tmp_path) == ["completed", "completed"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_tasks_of_a_step_make_up_one_run(slurm: dict[str, str], tmp_path: Path, ranks: int) -> None:
    """Two tasks, each on a node of its own: the ranks themselves, or each starts two of them."""
    words = [*TWENTY, "distributed=ddp", f"distributed.num_processes={ranks}"]
    step = ["srun", "--partition=debug", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "sft_lab", *words]
    env = {**slurm, **environment()}
    done = check(
        subprocess.run(
            [*step, "hydra.run.dir=step"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )
    )
    assert done.stdout.count(f"distributed: {ranks} ranks") == 1
    alone = [sys.executable, "-m", "sft_lab", *words, "hydra.run.dir=alone"]
    check(subprocess.run(alone, cwd=tmp_path, env=env, capture_output=True, text=True, check=False))
    assert adapter(tmp_path / "step") == adapter(tmp_path / "alone")


def test_a_trial_over_two_nodes_is_one_run(slurm: dict[str, str], tmp_path: Path) -> None:
    words = ["-m", *TWENTY, "distributed=ddp", "distributed.num_processes=2", "sweep.name=s", "hydra/launcher=slurm"]
    words += ["hydra.launcher.partition=debug", "hydra.launcher.nodes=2", "hydra.launcher.cpus_per_task=1"]
    env = {**slurm, **environment()}
    command = [sys.executable, "-m", "sft_lab", *words]
    check(subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False))
    assert states(tmp_path) == ["completed"]
    (trial,) = (tmp_path / "outputs" / "sweeps" / "s").glob("lora-*")
    assert (trial / "checkpoints" / "checkpoint-20" / "rng_state_1.pth").is_file()


def test_slurm_warns_and_requeues_a_run_that_goes_on(slurm: dict[str, str], tmp_path: Path) -> None:
    """SIGUSR1 from Slurm itself: the run saves, its job goes back into the queue, and the same script completes it."""
    words = [
        *TWENTY,
        "trainer.max_steps=400",
        "trainer.logging_steps=1",
        "distributed=ddp",
        "distributed.num_processes=2",
    ]
    script = tmp_path / "job.sh"
    script.write_text(
        "#!/bin/sh\n"
        f'[ -f run/config.yaml ] && DO="resume run" || DO="{" ".join(words)} hydra.run.dir=run"\n'
        f"srun --ntasks=1 {sys.executable} -m sft_lab $DO\n"
    )
    env = {**slurm, **environment()}
    submit = ["sbatch", "--parsable", "--partition=debug", "--ntasks=1", "--cpus-per-task=2", "--requeue"]
    submit += ["--open-mode=append", str(script)]
    job_id = check(
        subprocess.run(submit, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    ).stdout.strip()
    status = tmp_path / "run" / "status.json"

    def wait(what: str, reached: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE_S
        while not reached():
            assert time.monotonic() < until, what
            time.sleep(0.5)

    metrics = tmp_path / "run" / "metrics.jsonl"
    wait("it trains", lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 20)
    subprocess.run(["scancel", "--signal=USR1", job_id], env=env, check=True)
    wait("it saves", lambda: read(status)["state"] == "interrupted")
    assert read(status)["error"] == "interrupted by SIGUSR1"
    pending = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    wait(
        "it waits",
        lambda: "PENDING" in subprocess.run(pending, env=env, capture_output=True, text=True, check=True).stdout,
    )
    time.sleep(2)  # until Slurm has seen the last of the old job
    subprocess.run(["scontrol", "update", f"JobId={job_id}", "StartTime=now"], env=env, check=True)
    wait("it is complete", lambda: read(status)["state"] == "completed")
