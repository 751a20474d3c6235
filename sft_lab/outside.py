"""Processes of one command that were started from outside: by torchrun, `accelerate launch`, or a step of Slurm.

The first of them leads: it composes, checks and prepares. The others wait for its word and then take their part from
the run directory, which all of them see. They meet in a `TCPStore`, long before there is a process group, so that no
collective's timeout counts the time that the data takes.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sft_lab.errors import ConfigError

_PATIENCE = timedelta(
    days=7
)  # preparing data has no timeout; when the leader dies its store does, and with it all wait


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
    attempt: int = 0  # how often whoever started them has started them again
    hosted: bool = False  # whether the starter holds the store already

    @property
    def leads(self) -> bool:
        return self.index == 0

    def store(self) -> Any:
        """The `TCPStore` that all of them share, held by the first one unless the starter does."""
        from torch.distributed import PrefixStore, TCPStore

        store = TCPStore(
            self.address,
            self.port,
            is_master=self.leads and not self.hosted,
            timeout=_PATIENCE,
            wait_for_workers=False,
            multi_tenant=True,
        )
        return PrefixStore("sft_lab", store)

    def as_rank(self) -> dict[str, str]:
        """The environment of a rank, as torch.distributed reads it."""
        return {
            "RANK": str(self.index),
            "WORLD_SIZE": str(self.count),
            "LOCAL_RANK": str(self.local_index),
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
            attempt=int(env.get("TORCHELASTIC_RESTART_COUNT", "0")),
            hosted=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return Group(
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env["SLURM_LOCALID"]),
            "Slurm",
            env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
            int(env.get("MASTER_PORT") or 20000 + int(env["SLURM_JOB_ID"]) % 20000),
            nodes=int(env["SLURM_STEP_NUM_NODES"]),
        )
    return None


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
    """Of a list such as node[1-4], which Slurm itself takes apart."""
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


# ------------------------------------------------------------------------------------------------------------ words


def tell(store: Any, group: Group, word: dict[str, Any]) -> None:
    """What the others are to do: {"run": DIR, ...}, or {"leave": EXIT CODE}."""
    store.set(f"word/{group.attempt}", json.dumps(word))


def told(store: Any, group: Group) -> dict[str, Any]:
    """What the first one says, however long it takes.

    Raises:
        torch.distributed.DistNetworkError: it died.
    """
    word: dict[str, Any] = json.loads(store.get(f"word/{group.attempt}"))
    return word


def earlier(store: Any, group: Group) -> dict[str, Any] | None:
    """What was told before all were started again by the same starter, whose store has outlived them."""
    for attempt in range(group.attempt - 1, -1, -1):
        if store.check([f"word/{attempt}"]):
            word: dict[str, Any] = json.loads(store.get(f"word/{attempt}"))
            return word
    return None


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
