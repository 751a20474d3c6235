"""Processes of one command that were started from outside: by torchrun, `accelerate launch`, or a step of Slurm."""

from __future__ import annotations

import math
import os
import socket
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sft_lab.errors import ConfigError, RunError
from sft_lab.schema import DistributedConfig

CONNECT = timedelta(minutes=10)  # that a process may come later than another


@dataclass(frozen=True)
class Group:
    """This process among those that were started with it."""

    index: int
    count: int
    local_index: int  # on its machine
    by: str
    address: str  # where the first one can be reached
    port: int
    nodes: int = 1
    local_count: int = 1  # of them, on its machine
    hosted: bool = False  # whether the starter holds the store already
    name: str = ""  # of what started them, where several may meet at one address

    @property
    def leads(self) -> bool:
        return self.index == 0

    def store(self) -> Any:
        """The `TCPStore` that all of them share, held by the first one unless the starter does.

        Raises:
            RunError: nobody holds it there.
        """
        from torch.distributed import DistError, PrefixStore, TCPStore

        try:
            store = TCPStore(
                self.address,
                self.port,
                is_master=self.leads and not self.hosted,
                timeout=CONNECT,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except DistError as error:
            said = str(error).splitlines()[0]
            raise RunError(f"no meeting of processes at {self.address}, port {self.port} ({said})") from error
        return PrefixStore(f"sft_lab/{self.name}", store)

    def ranks_here(self, num_processes: int) -> int:
        """How many ranks of a run of `num_processes` take their GPUs from those that this process sees."""
        import torch

        if num_processes > self.count:  # each task starts its node's
            return num_processes // self.count
        of_node = int(os.environ.get("SLURM_GPUS_ON_NODE", self.local_count))
        bound = self.by == "Slurm" and torch.cuda.device_count() == 1 < of_node  # each task to a GPU of its own
        return 1 if bound else self.local_count

    def as_rank(self) -> dict[str, str]:
        """The environment of a rank, as torch.distributed reads it."""
        import torch

        gpus = torch.cuda.device_count()  # one alone, where Slurm binds each task to its own
        return {
            "RANK": str(self.index),
            "WORLD_SIZE": str(self.count),
            "LOCAL_RANK": str(self.local_index % gpus if gpus else self.local_index),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def group() -> Group | None:
    """The group that this process was started in, None where it stands alone."""
    env = os.environ
    if int(env.get("WORLD_SIZE", "1")) > 1 and "RANK" in env:
        return Group(
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", "0")),
            "torchrun",
            env.get("MASTER_ADDR", "localhost"),
            int(env.get("MASTER_PORT", "29500")),
            local_count=int(env.get("LOCAL_WORLD_SIZE", "1")),
            hosted=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:  # a batch script alone has SLURM_NTASKS and SLURM_PROCID too
        nodes = int(env["SLURM_STEP_NUM_NODES"])
        return Group(
            int(env["SLURM_PROCID"]),
            tasks,
            int(env["SLURM_LOCALID"]),
            "Slurm",
            env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
            int(env.get("MASTER_PORT") or _port(int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"]))),
            nodes=nodes,
            local_count=math.ceil(tasks / nodes),
            name=f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}",
        )
    return None


def _port(job: int, step: int) -> int:
    """Where a step's processes meet; the ranks that they start meet at the next one.

    Of 5000 places each of a job's steps has its own, and 3089, near their golden section, keeps the first ones of a job
    away from those of the jobs that follow it.
    """
    return 20000 + 2 * ((job + 3089 * step) % 5000)


def processes() -> int:
    """What distributed.num_processes=0 comes to: as many ranks as were started, else one a GPU.

    Raises:
        ConfigError: there is neither.
    """
    import torch

    started = group()
    gpus = torch.cuda.device_count()
    if started is not None and started.by == "torchrun":
        return started.count
    if started is not None:  # a task a node starts a rank a GPU, tasks that share a node are ranks
        return started.count * gpus if started.nodes == started.count and gpus else started.count
    if gpus:
        return gpus
    raise ConfigError(
        "distributed.num_processes=0 : is one a GPU, and there is none (allowed: distributed.num_processes=N)"
    )


def _first_host(nodes: str) -> str:
    """Of a list such as node[1-4], which Slurm itself takes apart: its name, or the address by which Slurm knows it."""
    name = _scontrol("hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        fields = dict(field.partition("=")[::2] for field in _scontrol("node", name, "--oneliner").split())
        return fields["NodeAddr"]
    return name


def _scontrol(*words: str) -> str:
    """
    Raises:
        ConfigError: it is not there, or does not answer.
    """
    command = ["scontrol", "show", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip()
        raise ConfigError(
            f"MASTER_ADDR : is not set, and `{' '.join(command)}` does not tell the step's first node: {reason} "
            "(allowed: its name or address)"
        ) from error


def require_room(d: DistributedConfig) -> None:
    """
    Raises:
        ConfigError: the processes that were started cannot be the ranks that the config asks for.
    """
    found = group()
    if found is None:
        return
    if d.method == "single":
        raise ConfigError(
            f"distributed=single : {found.by} started this command {found.count} times (allowed: distributed=ddp or "
            "another method of several, or to start it once)"
        )
    if d.num_processes != found.count and (d.num_processes % found.count or found.nodes != found.count):
        more = ", or a multiple: each task then starts its node's ranks" if found.nodes == found.count else ""
        raise ConfigError(
            f"distributed.num_processes={d.num_processes} : {found.by} started {found.count} "
            f"(allowed: {found.count}{more})"
        )
    if d.max_restarts and d.num_processes == found.count:
        raise ConfigError(
            f"distributed.max_restarts={d.max_restarts} : {found.by} started the ranks, and alone can start them again "
            "(allowed: 0, and torchrun --max_restarts)"
        )


def requeue() -> str:
    """Put the Slurm job that this process belongs to back into its queue; says in words what came of it."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return ""
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        return f"job {job} could not be requeued: {reason.strip()}"
    return f"job {job} is back in Slurm's queue"
