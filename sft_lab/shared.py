"""One set of base weights for all trials of a process.

A trial gets modules of its own around the parameters that were read once, so that adapters, hooks and settings of one
never reach the next. With a 4-bit parameter comes its state (scales and code book), which is shared like the numbers
that it scales. Embeddings that grow are the trial's own (`own_embeddings`). That the weights are still what was read is
proven after each trial, not believed: full fine-tuning changes them, and so may a library. What was changed is read
anew.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from sft_lab.console import say


class SharedBase:
    """Keeps the base model that was asked for last."""

    def __init__(self) -> None:
        self._key: Any = None
        self._model: Any = None
        self._digest = ""
        self._loaded: list[tuple[Any, bool]] = []

    def get(self, key: Any, load: Callable[[], Any]) -> Any:
        """A model whose parameters and buffers are those of `load()`, which is called where `key` is a new one."""
        if self._model is None or self._key != key:
            self._forget()
            self._model, self._key = load(), key
            self._digest = digest(self._model)
            self._loaded = [(parameter.device, parameter.requires_grad) for parameter in self._model.parameters()]
        parameters = list(self._model.parameters())
        # a 4-bit layer has a reference of its own to its parameter's state
        states = [state for state in map(_quantisation, parameters) if state is not None]
        return copy.deepcopy(self._model, {id(kept): kept for kept in [*parameters, *self._model.buffers(), *states]})

    def verify(self) -> bool:
        """Whether the weights are what they were, to the byte; else they are let go of. Called between two trials."""
        if self._model is None:
            return True
        self._put_back()
        if digest(self._model) == self._digest:
            return True
        say("the trial changed the base model's weights: they are read anew for the next")
        self._forget()
        return False

    def _put_back(self) -> None:
        """A trial freezes parameters and moves them to the GPU, where the next would draw its new weights otherwise."""
        for parameter, (device, requires_grad) in zip(self._model.parameters(), self._loaded, strict=True):
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
            if parameter.device != device:
                parameter.data = parameter.data.to(device)

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


def own_embeddings(model: Any) -> None:
    """Give a model that shares its weights embeddings of its own, since to grow them changes the parameters in place.

    What is tied stays tied: wherever the model had one parameter, it has one copy of it.
    """
    if _current is None:
        return
    parts = [model.get_input_embeddings(), model.get_output_embeddings()]
    grown = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in grown:
                setattr(module, name, copy.deepcopy(parameter, copies))


def digest(model: Any) -> str:
    """A digest by name of every parameter's and buffer's bytes, and of what 4-bit parameters are scaled by."""
    import torch
    import xxhash

    found = xxhash.xxh3_128()
    for name, tensor in _tensors(model):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    yield from model.named_buffers()
    for name, parameter in model.named_parameters():
        yield name, parameter
        if (state := _quantisation(parameter)) is not None:
            for part, tensor in state.as_dict(packed=True).items():
                yield f"{name}.{part}", tensor


def _quantisation(parameter: Any) -> Any:
    """The `QuantState` of bitsandbytes' 4-bit parameters, which is neither parameter nor buffer; None for others."""
    return getattr(parameter, "quant_state", None)
