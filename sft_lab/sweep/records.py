"""What run directories hold, read to be compared: finished, failed, cut short, or written by an older version.

Nothing here raises for a run that lacks something: what is missing is None or empty, and what cannot be read is
named in `Record.problems`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sft_lab import config as configs
from sft_lab import directories
from sft_lab.errors import ConfigError
from sft_lab.runs import RunDirectory, read_json
from sft_lab.sweep.differences import differing, is_number

NOT_COMPARED = ("preflight", "sweep", "tracking")  # sections that change nothing of what is trained


@dataclass
class Record:
    """One run. `state` is that of status.json, or pruned, planned (not begun) or unknown (no status.json)."""

    name: str
    path: Path
    sweep: str = ""  # name of the sweep that it is a trial of
    state: str = "unknown"
    error: str = ""
    pruned_at_step: int | None = None
    config: dict[str, Any] = field(default_factory=dict)  # by dotted key
    metrics: dict[str, float] = field(default_factory=dict)  # of result.json
    steps: int | None = None
    train_s: float | None = None
    tokens_per_s: float | None = None
    peak_memory_bytes: int | None = None
    adapter_bytes: int | None = None
    trainable_parameters: int | None = None
    tokens: int | None = None  # trained on, without padding
    events: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl
    samples: list[dict[str, Any]] = field(default_factory=list)
    wandb_id: str = ""
    wandb_url: str = ""  # of a run that was online
    problems: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.state == "completed"

    @property
    def why(self) -> str:
        """Why it did not finish, or what of it could not be read."""
        begun = {
            "pruned": f"pruned at step {self.pruned_at_step}",
            "running": f"not ended, at step {self.steps}, or killed",
            "interrupted": f"interrupted at step {self.steps}",
            "planned": "not begun",
            "unknown": "no status.json",
        }.get(self.state, "")
        return "; ".join(filter(None, [begun, self.error, *self.problems]))


@dataclass
class Sweep:
    """What sweep.json says of a sweep; `left_out` holds {"overrides", "reason"}."""

    name: str
    path: Path
    objective: str = ""
    direction: str = ""
    sampler: str = ""
    left_out: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Comparison:
    """Runs to be seen side by side, and the sweeps that they are trials of."""

    records: list[Record]
    sweeps: list[Sweep]

    @property
    def keys(self) -> list[str]:
        return differing(self.records)


# --------------------------------------------------------------------------------------------------------- reading


def read(directories: Sequence[str | os.PathLike[str]]) -> Comparison:
    """The runs of all directories, each a run directory or a directory of them; a run given twice counts once.

    Raises:
        ConfigError: each directory that is not there or holds no run.
    """
    records: dict[Path, Record] = {}
    sweeps: dict[Path, Sweep] = {}
    wrong = []
    for directory in directories:
        path = Path(directory).resolve()
        if not path.is_dir():
            wrong.append(f"{directory} : no such directory (allowed: a run directory, or a directory of them)")
            continue
        found = [read_run(path)] if _is_run(path) else _read_sweep(path, sweeps)
        if not found:
            wrong.append(f"{directory} : holds no run (allowed: a run directory, or a directory of them)")
        records |= {record.path: record for record in found if record.path not in records}
    if wrong:
        raise ConfigError(wrong)
    _name_apart(list(records.values()))
    return Comparison(list(records.values()), list(sweeps.values()))


def _is_run(path: Path) -> bool:
    run = RunDirectory(path)
    return directories.is_config(run.config) or directories.is_status(run.status)


def _read_sweep(path: Path, sweeps: dict[Path, Sweep]) -> list[Record]:
    problems: list[str] = []
    ledger = _mapping(path / "sweep.json", read_json, problems)
    names = sorted(child.name for child in path.iterdir() if not child.name.startswith(".") and _is_run(child))
    planned = sorted(_dict(ledger.get("trials")).keys() - set(names))
    if ledger:
        sweeps[path] = Sweep(
            str(ledger.get("name") or path.name),
            path,
            **{key: str(ledger.get(key) or "") for key in ("objective", "direction", "sampler")},
            left_out=[entry for entry in ledger.get("left_out") or [] if isinstance(entry, dict)],
        )
    records = [read_run(path / name) for name in names]
    records += [_planned(path / name, path / "planned" / f"{name}.yaml") for name in planned]
    for record in records:
        record.sweep = sweeps[path].name if ledger else ""
    if problems and records:
        records[0].problems += problems
    return records


def _planned(path: Path, file: Path) -> Record:
    problems: list[str] = []
    config = _flat_config(_mapping(file, _read_yaml, problems))
    return Record(path.name, path, state="planned", config=config, problems=problems)


def read_run(path: Path) -> Record:
    """The record of one run directory, with what it has."""
    run, problems = RunDirectory(path), list[str]()
    config = _mapping(run.config, _read_yaml, problems)
    status = _mapping(run.status, read_json, problems)
    result = _mapping(run.result, read_json, problems)
    preflight = _mapping(run.preflight, read_json, problems)
    record = Record(
        name=run.path.name,
        path=run.path,
        state=str(status.get("state") or "unknown"),
        error=str(status.get("error") or ""),
        pruned_at_step=_number(status.get("pruned_at_step")),
        config=_flat_config(config),
        metrics={k: v for k, v in _dict(result.get("metrics")).items() if _number(v) is not None},
        steps=_number(result.get("steps", status.get("step"))),
        train_s=_number(result.get("train_s")),
        tokens_per_s=_number(result.get("tokens_per_s")),
        peak_memory_bytes=_number(result.get("peak_memory_bytes")),
        adapter_bytes=_number(result.get("adapter_bytes")),
        trainable_parameters=_number(_dict(preflight.get("parameters")).get("trainable")),
        events=_lines(run.metrics, problems),
        samples=_lines(run.samples, problems),
        problems=problems,
    )
    if record.state == "interrupted" and record.pruned_at_step is not None:
        record.state = "pruned"
    record.tokens = max((n for event in record.events if (n := _number(event.get("tokens")))), default=None)
    record.wandb_id, record.wandb_url = _wandb(run, "run_id"), _wandb(run, "url")
    return record


def _wandb(run: RunDirectory, name: str) -> str:
    """What lies in a run's wandb/: its `run_id`, and, where it was online, its `url`."""
    file = run.wandb / name
    return file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""


def _read_yaml(file: Path) -> Any:
    # safe_load is the same in Python: 12 ms a config, which hundreds of trials make seconds
    return yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)


def _mapping(file: Path, reader: Callable[[Path], Any], problems: list[str]) -> dict[str, Any]:
    """The mapping in a file; empty where there is none, or where the file is damaged, which is a problem."""
    if not file.is_file():
        return {}
    try:
        return _dict(reader(file))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problems.append(f"{file.name} cannot be read: {str(error).splitlines()[0]}")
        return {}


def _lines(file: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; a line torn by a kill, or damaged, is left out."""
    if not file.is_file():
        return []
    values, damaged = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            values += [_dict(json.loads(line))] if line.strip() else []
        except ValueError:
            damaged += 1
    if damaged:
        problems.append(f"{file.name}: {damaged} damaged lines")
    return values


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> Any:
    return value if is_number(value) else None


def _flat_config(sections: dict[str, Any]) -> dict[str, Any]:
    return configs.flat({name: value for name, value in sections.items() if name not in NOT_COMPARED})


def _name_apart(records: Sequence[Record]) -> None:
    """Prefix names that several runs have with the directories above, until each has its own."""
    for depth in range(2, 10):
        names = [record.name for record in records]
        for record in records:
            if names.count(record.name) > 1:
                record.name = "/".join(record.path.parts[-depth:])
