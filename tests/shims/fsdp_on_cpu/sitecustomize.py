"""Lets accelerate shard with FSDP2 on CPUs: put this folder on PYTHONPATH of each rank, and nowhere else.

accelerate turns to FSDP only for processes that have a GPU each: with `use_cpu` it keeps plain data parallelism and says
nothing. PyTorch itself shards over gloo. Python imports this module when it starts, so that nothing in the program
knows of it, and `accelerate.state` is changed only once something imports it: a process without torch stays without.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MODULE = "accelerate.state"


class _StateLoader(importlib.abc.Loader):
    """Loads `accelerate.state` as it would have been, then changes its AcceleratorState."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _shard_on_cpu(module)


class _StateFinder(importlib.abc.MetaPathFinder):
    """Finds `accelerate.state` where it is, and gives it the loader above."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _StateLoader(spec.loader)
        return spec


def _shard_on_cpu(state: Any) -> None:
    """After `AcceleratorState.__init__`, do for several CPU processes what it does for several GPU ones."""
    original = state.AcceleratorState.__init__

    def initialise(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is None or self.distributed_type != state.DistributedType.MULTI_CPU:
            return
        self.distributed_type = state.DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = self.distributed_type  # as the original ends

    state.AcceleratorState.__init__ = initialise


sys.meta_path.insert(0, _StateFinder())
