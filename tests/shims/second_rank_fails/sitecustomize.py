"""Lets the second rank fail in training with an error that nobody foresaw, while the first one waits for it."""

from __future__ import annotations

import os
from typing import Any

from tests.shims.importing import once_imported


def _fail(self: Any, *args: Any, **kwargs: Any) -> None:
    raise ValueError("nobody foresaw this")


def _failing(module: Any) -> None:
    module.Saving.on_step_end = _fail


if os.environ.get("RANK") == "1":
    once_imported("sft_lab.callbacks", _failing)
