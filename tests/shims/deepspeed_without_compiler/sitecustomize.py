"""DeepSpeed on CPUs without its own operator for shared memory, which it would compile: gloo does all that training asks."""

from __future__ import annotations

from typing import Any

from tests.shims.importing import once_imported


def _without_operator(module: Any) -> None:
    module.build_shm_op = lambda: None


once_imported("deepspeed.comm.torch", _without_operator)
