"""A real Slurm: a sweep as a job array whose jobs are lost in every way there is, steps, and jobs whose time is over."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sft_lab.runs import RunDirectory
from tests.conftest import ROOT
from tests.distributed.starting import TWENTY, adapter, environment
from tests.sweep.test_sweep import UNTRACKED, states, times, trials
from tests.test_readme import JOB
from tests.test_run import check, lines, read

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


def wait(what: str, reached: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < until, what
        time.sleep(0.1)


def trains(run: Path, step: int) -> Callable[[], bool]:
    """Whether a run has come that far."""
    return lambda: any(event["step"] >= step for event in RunDirectory(run).read_metrics())


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
    heard = ["env", "--default-signal=INT", *command]  # which a shell lets its background jobs ignore
    process = subprocess.Popen(heard, cwd=tmp_path, env=slurm, stdout=pipe, stderr=pipe, text=True)
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


def test_ctrl_c_says_so_too_while_it_waits_for_what_a_lost_job_has_left(slurm: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sft_lab", *(word for word in WORDS if "=1e-3" not in word)]
    command += ["trainer.learning_rate=1e-3,2e-3", "hydra.launcher.array_parallelism=1", "trainer.max_steps=5000"]
    pipe = subprocess.PIPE
    heard = ["env", "--default-signal=INT", *command]
    process = subprocess.Popen(heard, cwd=tmp_path, env=slurm, stdout=pipe, stderr=pipe, text=True)
    try:
        subprocess.run(["scancel", "--full", "--signal=KILL", job(slurm, 0, "RUNNING")], env=slurm, check=True)
        array = job(slurm, 1, "RUNNING").partition("_")[0]
        _, second = trials(tmp_path).values()
        wait("it trains, and the loss of the first was seen long ago", trains(second, 5))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
        subprocess.run(["scancel", "--me"], env=slurm, check=True)
    assert process.returncode == 130, out + err
    assert f"scancel {array} ends them" in out


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_tasks_of_a_step_make_up_one_run(slurm: dict[str, str], tmp_path: Path, ranks: int) -> None:
    """Two tasks, each on a node of its own: the ranks themselves, or each starts two of them."""
    words = [*TWENTY, "distributed=ddp", f"distributed.num_processes={ranks}"]
    step = ["srun", "--partition=debug", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "sft_lab", *words]
    env = {**slurm, **environment("ranks_only_train")}
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


def readme_script(words: list[str]) -> str:
    """big.sh with another run's words, and what these nodes have."""
    script = JOB
    for there, here in (
        ("distributed=fsdp2 distributed.num_processes=16 model=llama3_8b", " ".join(words)),
        (" --gpus-per-node=8 --cpus-per-task=64", " --cpus-per-task=2"),
    ):
        assert script.count(there) == 1
        script = script.replace(there, here)
    return script


def processes_in(folder: Path) -> list[psutil.Process]:
    """Tasks that were started there, and then ranks that they have started."""
    found: dict[str, list[psutil.Process]] = {"sft_lab": [], "sft_lab.worker": []}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            module = re.search(r"^\S*python\S* (?:-u )?-m (\S+)", " ".join(process.cmdline()))
            if module and module[1] in found and process.cwd() == str(folder):
                found[module[1]].append(process)
    return found["sft_lab"] + found["sft_lab.worker"]


def is_stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_readmes_script_goes_on_after_its_time_is_over(slurm: dict[str, str], tmp_path: Path, ranks: int) -> None:
    """Slurm warns both tasks, each on a node of its own; the run saves, its job goes back into the queue, starts again and
    ends as if nothing had happened.

    Slurm looks at its clock every 30 s. So that it finds the run still training, on however fast a machine, its processes
    are stopped until then; Slurm wakes those that it warns.
    """
    words = [*TWENTY, "trainer.max_steps=60", "trainer.logging_steps=1", "distributed=ddp"]
    words += [f"distributed.num_processes={ranks}"]
    (tmp_path / "big.sh").write_text(readme_script(words))
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f"PATH={programs}:{Path(sys.executable).parent}:$PATH\n")
    # A busy controller answers late: a task that ended with an error would meanwhile have ended them all.
    (programs / "scontrol").write_text(
        f'#!/bin/sh\n[ "$1" = requeue ] && sleep 3\nexec {shutil.which("scontrol")} "$@"\n'
    )
    (programs / "scontrol").chmod(0o755)
    run, env = tmp_path / "outputs" / "big", {**slurm, **environment()}

    def command(*words: str) -> str:
        return check(subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)).stdout

    job_id = command("sbatch", "--parsable", "big.sh").strip()

    def shows(what: str) -> Callable[[], bool]:
        return lambda: what in command("scontrol", "show", "job", job_id)

    wait("it trains", trains(run, 3))
    here = processes_in(tmp_path)
    assert len(here) == (2 if ranks == 2 else 2 + ranks)
    for process in here:
        process.suspend()
    command("scontrol", "update", f"JobId={job_id}", "TimeLimit=5")  # minutes, of which the last 5 are the warning's
    wait("Slurm has warned both tasks", lambda: not any(is_stopped(task) for task in here[:2]))
    for rank in here[2:]:
        rank.resume()
    wait("its job was requeued", shows("Restarts=1"))
    command("scontrol", "update", f"JobId={job_id}", "TimeLimit=60")
    status = read(run / "status.json")
    assert (status["state"], status["error"]) == ("interrupted", "interrupted by SIGUSR1")
    assert 3 <= status["step"] < 60
    wait("it is over", shows("JobState=COMPLETED"))
    assert shows("ExitCode=0:0")()
    assert shows("Restarts=1")()

    output = (tmp_path / f"slurm-{job_id}.out").read_text()
    assert "sft_lab: interrupted by SIGUSR1" in output
    assert f"sft_lab: job {job_id} is back in Slurm's queue" in output
    assert output.count(f"going on from step {status['step']}") == 1
    assert output.count(f"distributed: {ranks} ranks, gradients averaged by DistributedDataParallel") == 2
    assert read(run / "status.json")["state"] == "completed"
    assert [event["step"] for event in lines(run / "metrics.jsonl") if event["split"] == "train"] == list(range(1, 61))
    command(sys.executable, "-m", "sft_lab", *words, "hydra.run.dir=undisturbed")
    assert adapter(run) == adapter(tmp_path / "undisturbed")


def test_a_trial_whose_time_is_over_goes_back_into_the_queue_as_often_as_is_allowed(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    """Warned by the signal that submitit has asked for: once it goes on, the second time it ends, until the same command.

    Of a time limit of 10 minutes submitit takes every moment for its end.
    """
    train = [*TWENTY, "trainer.max_steps=150", "trainer.logging_steps=1"]
    words = ["-m", *train, "sweep.name=s", "seed=1,2", "hydra/launcher=slurm", "hydra.launcher.partition=debug"]
    words += ["hydra.launcher.timeout_min=10", "hydra.launcher.max_num_timeout=1"]
    command, env = [sys.executable, "-m", "sft_lab", *words], {**slurm, **environment()}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=pipe, text=True)
    try:
        first = job(slurm, 0, "RUNNING")
        trial, _ = trials(tmp_path).values()
        for restarts, step in enumerate((10, 20)):
            wait("it trains", trains(trial, step))
            subprocess.run(["scancel", "--signal=USR2", first], env=slurm, check=True)
            wait("it saves", lambda: read(trial / "status.json")["state"] == "interrupted")
            if restarts == 0:
                job(slurm, 0, "PENDING")
                job(slurm, 0, "RUNNING")
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 1, out + err
    assert states(tmp_path) == ["interrupted", "completed"]
    check(subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S))
    assert states(tmp_path) == ["completed", "completed"]
    logs = (tmp_path / "outputs" / "sweeps" / "s" / ".submitit").glob("*/*_log.out")
    assert sum(log.read_text().count("going on from step") for log in logs) == 2
    alone = [sys.executable, "-m", "sft_lab", *train, "seed=1", "hydra.run.dir=alone"]
    check(subprocess.run(alone, cwd=tmp_path, env=env, capture_output=True, text=True, check=False))
    assert adapter(trial) == adapter(tmp_path / "alone")
