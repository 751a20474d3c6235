"""The checkpoints of a run: which of them are whole, and which is the newest.

A checkpoint is a directory of many files, which the Trainer writes one after the other. It counts once it is sealed: a
list of its files and their sizes, written last.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from sft_lab import directories
from sft_lab.runs import RunDirectory, read_json, write_json

_SEAL = "whole.json"


def at(run: RunDirectory, step: int) -> Path:
    return run.checkpoints / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole; called after its last file was written.

    All of it is on the disk before the mark is: a machine that loses its power keeps sizes longer than contents.
    """
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    write_json(checkpoint / _SEAL, {str(path.relative_to(checkpoint)): path.stat().st_size for path in files})


def newest(run: RunDirectory) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and why each newer one was passed over."""
    passed_over: list[str] = []
    for checkpoint in sorted(_all(run), key=step_of, reverse=True):
        problem = _damage(checkpoint)
        if problem is None:
            return checkpoint, passed_over
        passed_over.append(f"{checkpoint.name}: {problem}")
    return None, passed_over


def drop_torn(run: RunDirectory) -> None:
    """Delete those that are not complete.

    Raises:
        ConfigError: one of them has a file in it that no run wrote; nothing is deleted.
    """
    torn = [checkpoint for checkpoint in _all(run) if _damage(checkpoint)]
    for checkpoint in torn:
        directories.require_own_checkpoint(checkpoint)
    for checkpoint in torn:
        shutil.rmtree(checkpoint, ignore_errors=True)


def keep(run: RunDirectory, limit: int) -> None:
    """Delete the oldest ones, so that the newest `limit` stay."""
    for checkpoint in sorted(_all(run), key=step_of)[:-limit]:
        if directories.foreign_in_checkpoint(checkpoint) is None:
            shutil.rmtree(checkpoint, ignore_errors=True)


def saved_bytes(run: RunDirectory) -> int:
    """What they take; those that a run under way removes meanwhile do not count."""
    found = 0
    for checkpoint in _all(run):
        with contextlib.suppress(FileNotFoundError):
            found += sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    return found


def _all(run: RunDirectory) -> list[Path]:
    found = run.checkpoints.glob("checkpoint-*")
    return [path for path in found if directories.CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def _damage(checkpoint: Path) -> str | None:
    if not (checkpoint / _SEAL).is_file():
        return "not whole, the run ended while it was being saved"
    for name, size in read_json(checkpoint / _SEAL).items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None
