"""Lets the first process that asks for the model in a directory fail, and no other after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.shims.importing import once_imported


def _failing(module: Any) -> None:
    from sft_lab.errors import RunError

    fetch = module.fetch

    def failing_first(model: Any) -> None:
        try:
            Path("asked").touch(exist_ok=False)
        except FileExistsError:
            fetch(model)
        else:
            raise RunError("the hub is away")

    module.fetch = failing_first


once_imported("sft_lab.model", _failing)
