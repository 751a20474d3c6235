"""A sweep as a Slurm job array that goes on when some of its jobs are lost.

The launcher of hydra-submitit-launcher learns that a job is over from its result file, or from `sacct`. On a cluster
without accounting a job that was cancelled, or killed before it wrote that file, would be waited for forever; and with
accounting the first such job ends the wait for all others. Here `squeue` is asked, which every Slurm answers.
Imports submitit, which is an extra.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence

import submitit
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from omegaconf import DictConfig
from submitit.core.utils import UncompletedJobError
from submitit.slurm.slurm import SlurmInfoWatcher

from sft_lab.console import say
from sft_lab.errors import ConfigError, Interrupted, Leave, RunError

# What a job does not come back from (squeue(1), JOB STATE CODES). PREEMPTED is not among them: such a job may go back
# into the queue, and one that does not is GONE a few minutes later (MinJobAge in slurm.conf).
GONE = "GONE"
OVER = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", GONE}
)
_POLL_S = 1.0


class QueueWatcher(SlurmInfoWatcher):
    """The states of the jobs that were submitted, by one question to squeue for all of them."""

    def _make_command(self) -> list[str] | None:
        if not self.left:
            return None
        # not --jobs=ID, which fails as soon as Slurm has forgotten one of them
        return ["squeue", "--me", "--array", "--states=all", "--noheader", "--format=%i|%T"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """The answer as `{job: {"JobID", "State"}}`, of each that was not over before; GONE if it is listed no more."""
        text = string if isinstance(string, str) else string.decode()
        states = dict(line.strip().split("|", 1) for line in text.splitlines())
        return {job: {"JobID": job, "State": states.get(job, GONE)} for job in self.left}

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """False too while squeue cannot be asked. Submitit lists the states of a live job instead, and lacks some."""
        return self.get_state(job_id, mode=mode) in OVER

    @property
    def left(self) -> set[str]:
        """The jobs that were submitted and, as far as was asked, are not over."""
        return self._registered - self._finished

    def wait(self) -> dict[str, str]:
        """Until every job is over.

        Returns:
            The jobs that Slurm says did not complete, and their states.
        """
        while not all(self.is_done(job) for job in self._registered):
            time.sleep(_POLL_S)
        states = {job: self.get_state(job, mode="cache") for job in sorted(self._registered)}
        # GONE: the array itself, which is listed by its tasks alone, and what was over long ago
        return {job: state for job, state in states.items() if state not in ("COMPLETED", GONE)}


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """hydra/launcher=slurm."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """
        Raises:
            Leave: with a ConfigError; this machine submits no jobs, and was to do more than show the plan.
        """
        if not config.sweep.dry_run and shutil.which("sbatch") is None:
            raise Leave(
                ConfigError(
                    "hydra/launcher=slurm : no sbatch on this machine (allowed: a machine of the cluster; or "
                    "sweep.dry_run=true, hydra/launcher=local)"
                )
            )
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """
        Raises:
            RunError: some jobs were lost; the others have ended, and each trial's state tells what became of it.
        """
        watcher = QueueWatcher(delay_s=30)
        submitit.SlurmJob.watcher = watcher  # of the class: each job registers itself there as it is made
        try:
            try:
                return super().launch(job_overrides, initial_job_idx)
            except UncompletedJobError as error:
                lost = ", ".join(f"{job} {state}" for job, state in watcher.wait().items())
                raise RunError(f"Slurm jobs: {lost}" if lost else str(error)) from error
        except (KeyboardInterrupt, Interrupted):
            arrays = sorted({job.partition("_")[0] for job in watcher.left})
            if arrays:
                say(f"the jobs stay with Slurm, and go on without this command; scancel {' '.join(arrays)} ends them")
            raise
