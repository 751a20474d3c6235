"""One set of base weights for all trials of a process.

A trial gets modules of its own around the parameters that were read once, so that adapters, hooks and settings of one
never reach the next. That the weights are still what was read is proven after each trial, not believed: full
fine-tuning changes them, and so may a library. What was changed is read anew.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

log = logging.getLogger("sft_lab")


class SharedBase:
    """Keeps the base model that was asked for last."""

    def __init__(self) -> None:
        self._key: Any = None
        self._model: Any = None
        self._digest = ""

    def get(self, key: Any, load: Callable[[], Any]) -> Any:
        """A model whose parameters and buffers are those of `load()`, which is called where `key` is a new one."""
        if self._model is None or self._key != key:
            self._forget()
            self._model, self._key = load(), key
            self._digest = digest(self._model)
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return copy.deepcopy(self._model, {id(tensor): tensor for tensor in tensors})

    def verify(self) -> bool:
        """Whether the weights are what they were, to the byte; else they are let go of. Called between two trials."""
        if self._model is None:
            return True
        for parameter in self._model.parameters():
            parameter.grad = None
            parameter.requires_grad_(parameter.is_floating_point())
        if digest(self._model) == self._digest:
            return True
        log.info("the trial changed the base model's weights: they are read anew for the next")
        self._forget()
        return False

    def _forget(self) -> None:
        self._key = self._model = None


_current: SharedBase | None = None


@contextlib.contextmanager
def sharing() -> Iterator[SharedBase]:
    """Within it, `base` keeps what it loads until `verify` finds it changed."""
    global _current
    before, _current = _current, SharedBase()
    try:
        yield _current
    finally:
        _current = before


def base(key: Any, load: Callable[[], Any]) -> Any:
    """The model of `load()`, or one around the weights that an earlier call with the same key loaded."""
    return load() if _current is None else _current.get(key, load)


def verify() -> None:
    """Between two trials: prove that what they share is as it was, and let go of it otherwise."""
    if _current is not None:
        _current.verify()


def digest(model: Any) -> str:
    """A digest of every parameter's and buffer's bytes, by name."""
    import torch
    import xxhash

    found = xxhash.xxh3_128()
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
