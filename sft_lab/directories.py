"""Which directories a run or a sweep may write to: those that are new, empty, or hold only what one of them wrote.

Whatever else lies there belongs to somebody. It is never replaced, added to or deleted.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from sft_lab.errors import ConfigError

_SECTIONS = {"seed", "model", "peft", "data", "trainer"}  # of every run's config.yaml
_STATES = ("running", "completed", "failed", "interrupted")
_TEMPORARY = re.compile(r"\.(?!\.).+\.[0-9a-f]{8}\.tmp")  # what a killed process leaves of a file half written
_LAUNCHERS = re.compile(r"\.submitit|\.hydra|multirun\.yaml|slurm-.+\.(out|err)")  # logs and records of launchers
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# What the Trainer, PEFT, Accelerate and DeepSpeed put into a checkpoint, and our own files beside it.
_OF_CHECKPOINTS = re.compile(
    r"whole\.json|unlogged\.json|trainer_state\.json|training_args\.bin|(optimizer|scheduler|scaler)\.(pt|bin)"
    r"|rng_state.*\.pth|random_states_\d+\.pkl|adapter_config\.json|adapter_model\.(safetensors|bin)"
    r"|(model|pytorch_model)[-_.\w]*\.(safetensors|bin|json)|pytorch_model_fsdp_\d+|optimizer_\d+"
    r"|(generation_|processor_|preprocessor_)?config\.json|config(uration|_)\w*\.py|(modeling|tokenization)_\w+\.py"
    r"|README\.md|chat_template\.jinja|additional_chat_templates|(tokenizer|tokenizer_config|added_tokens)\.json"
    r"|special_tokens_map\.json|vocab\.\w+|merges\.txt|tekken\.json|[\w.]*\.model|global_step\d+|latest"
    r"|zero_to_fp32\.py|\..+\.tmp"
)
PAGE_MARK = '<meta name="generator" content="sft_lab">'  # in every page that is written


# ----------------------------------------------------------------------------------------------------------- whose


def is_config(path: Path) -> bool:
    """Whether a file is the config.yaml of a run."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(found, dict) and found.keys() >= _SECTIONS


def is_status(path: Path) -> bool:
    """Whether a file is the status.json of a run."""
    found = _json(path)
    return isinstance(found, dict) and found.get("state") in _STATES


def is_ledger(path: Path) -> bool:
    """Whether a file is the sweep.json of a sweep."""
    found = _json(path)
    return isinstance(found, dict) and isinstance(found.get("trials"), dict) and "left_out" in found


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------------ may be used


def require_for_run(path: Path, option: str = "hydra.run.dir") -> None:
    """
    Raises:
        ConfigError: something lies in the directory that a run which ended before it began does not leave.
    """
    _require_directory(path, option)
    entry = next((entry for entry in _entries(path) if not left_by_run(entry)), None)
    if entry is not None:
        raise _occupied(path, entry, option)


def require_for_sweep(path: Path) -> None:
    """
    Raises:
        ConfigError: the directory is no sweep's, and something lies in it.
    """
    option = "sweep.name or hydra.sweep.dir"
    _require_directory(path, option)
    if is_ledger(path / "sweep.json"):
        return
    entry = next(
        (entry for entry in _entries(path) if not (_is_lock(entry) or _is_empty(entry) or _passing(entry))), None
    )
    if entry is not None:
        raise _occupied(path, entry, option)


def _require_directory(path: Path, option: str) -> None:
    place = next(place for place in (path, *path.parents) if place.exists() or place.is_symlink())
    if not place.is_dir():
        raise ConfigError(f"{path}: {place} is no directory (allowed: another {option})")


def _entries(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def _passing(entry: Path) -> bool:
    """Whether it is what a killed process left of a file half written, or a launcher's own."""
    return bool(_TEMPORARY.fullmatch(entry.name) or _LAUNCHERS.fullmatch(entry.name))


def _is_empty(entry: Path) -> bool:
    """Whether there is no file in a directory, nor in those below."""
    return entry.is_dir() and not any(path.is_symlink() or not path.is_dir() for path in entry.rglob("*"))


def _is_lock(entry: Path) -> bool:
    """Whether it is a run's lock, which is empty, or a sweep's, which names its process."""
    return entry.name == ".lock" and entry.is_file() and entry.read_bytes()[:8] in (b"", b"process ")


def left_by_run(entry: Path) -> bool:
    """Whether it is what a run leaves that ended before its config was written, or a trial that could not begin.

    An empty directory is nobody's file: checkpoints/ may be another disk, mounted there beforehand.
    """
    return (
        _is_lock(entry)
        or _is_empty(entry)
        or entry.name == ".reserve"
        or _passing(entry)
        or (entry.name == "overrides.yaml" and (entry.parent / ".lock").is_file())
        or (entry.name == "status.json" and is_status(entry))
    )


def _occupied(path: Path, entry: Path, option: str) -> ConfigError:
    kind = "directory" if entry.is_dir() else "file"
    return ConfigError(
        f"{path}: holds the {kind} {entry.name}, which no run wrote; nothing was touched "
        f"(allowed: another {option}, of a directory that is new or empty)"
    )


# ------------------------------------------------------------------------------------------------ may be taken away


def require_replaceable(path: Path, *marks: str) -> None:
    """
    Args:
        marks: names of files that show a directory to be one of ours.

    Raises:
        ConfigError: there is something at `path` that shows none of them.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"{path}: is no directory that a run made, so it is not replaced (allowed: to move it away)")
    if path.is_dir() and any(path.iterdir()) and not any((path / mark).exists() for mark in marks):
        raise ConfigError(
            f"{path}: holds files that no run wrote, so it is not replaced (allowed: to move it away, or another "
            "directory for the run)"
        )


def foreign_in_checkpoint(path: Path) -> Path | None:
    """The first file in a checkpoint's directory that is none that training writes."""
    return next((entry for entry in sorted(path.iterdir()) if not _OF_CHECKPOINTS.fullmatch(entry.name)), None)


def require_own_checkpoint(path: Path) -> None:
    """
    Raises:
        ConfigError: a file in a checkpoint's directory is none that training writes, so that it is not deleted.
    """
    entry = foreign_in_checkpoint(path)
    if entry is not None:
        raise ConfigError(
            f"{path}: is not complete and holds {entry.name}, which no run wrote, so it is not deleted (allowed: to "
            "move it away)"
        )


def require_page(path: Path, option: str) -> None:
    """
    Raises:
        ConfigError: a page cannot be written to `path`, or a file lies there that is no such page.
    """
    if not path.name or path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{option}={path} : no file can be written there (allowed: a file in a directory that is)")
    if path.exists() and PAGE_MARK not in path.read_bytes()[:4096].decode(errors="replace"):
        raise ConfigError(f"{option}={path} : a file lies there that sft_lab did not write (allowed: another file)")


def require_journal(path: Path) -> None:
    """
    Raises:
        ConfigError: there is something at `path` that is no search's journal, which would be added to.
    """
    if not path.exists() and not path.is_symlink():
        return
    head = path.read_bytes()[:4096].partition(b"\n")[0] if path.is_file() else b"-"
    if head and b'"op_code"' not in head:
        raise ConfigError(f"hydra.sweeper.storage={path} : is no journal of a search (allowed: a file that is new)")
