"""Lets Accelerate shard with FSDP2 on CPUs.

It turns to FSDP only for processes that have a GPU each: with `use_cpu` it keeps plain data parallelism and says nothing.
PyTorch itself shards over gloo.
"""

from __future__ import annotations

from typing import Any

from tests.shims.importing import once_imported


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


once_imported("accelerate.state", _shard_on_cpu)
