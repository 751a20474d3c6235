"""The processes that train one run together, as `torch.distributed` knows them; a single one where there is none."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from typing import Any, TypeVar

from sft_lab.errors import RunError

T = TypeVar("T")
_AFTER_A_COLLECTIVE_S = 0.02  # what its thread has still to do takes microseconds, once it is given a core


def begin(expected: int, timeout_min: int, store: Any = None) -> None:
    """Join the other ranks; RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say where and as which.

    Args:
        store: where they meet, if not at MASTER_PORT.

    Raises:
        RunError: there are not as many as the config says.
    """
    import torch

    if sys.version_info < (3, 11, 10):
        os.register_at_fork(before=_let_threads_finish)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(
        backend,
        timeout=timedelta(minutes=timeout_min),
        store=store,
        **({"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])} if store else {}),
    )
    if size() != expected:
        raise RunError(f"distributed.num_processes={expected} : {size()} processes were started")


def _let_threads_finish() -> None:
    """Before a data worker is forked: while a thread of Gloo's enters the interpreter, to let go of a tensor, it holds
    a lock that nobody would give back in the child, which would wait for it forever, and the run for the child
    (python/cpython#112275).
    """
    time.sleep(_AFTER_A_COLLECTIVE_S)


def end() -> None:
    """Leave them, where there are any."""
    if together():
        import torch

        torch.distributed.destroy_process_group()


def together() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def index() -> int:
    import torch

    return torch.distributed.get_rank() if together() else 0


def size() -> int:
    import torch

    return torch.distributed.get_world_size() if together() else 1


def leads() -> bool:
    """Whether this rank is the one that writes files and speaks."""
    return index() == 0


def wait() -> None:
    """Until every rank has come here."""
    agreed(0)


def from_leader(value: T) -> T:
    """What the first rank gave, on every rank."""
    if not together():
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def gathered(value: T) -> list[T]:
    """What each rank gave, in their order, on every rank."""
    if not together():
        return [value]
    import torch

    box: list[Any] = [None] * size()
    torch.distributed.all_gather_object(box, value)
    return box


def agreed(*numbers: int) -> tuple[int, ...]:
    """The largest of each number over all ranks."""
    return _reduced(numbers, "MAX")


def total(number: int) -> int:
    """The sum of a number over all ranks."""
    return _reduced((number,), "SUM")[0]


def _reduced(numbers: tuple[int, ...], how: str) -> tuple[int, ...]:
    if not together():
        return numbers
    import torch

    box = torch.tensor(numbers, dtype=torch.int64)  # on the CPU: nothing waits for a GPU
    torch.distributed.all_reduce(box, getattr(torch.distributed.ReduceOp, how))
    return tuple(box.tolist())
