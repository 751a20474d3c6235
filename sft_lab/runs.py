"""The run directory: the one place that knows its paths and how they are written.

Every file appears whole or not at all: it is written beside its place under a temporary name and then renamed.
metrics.jsonl and train.log grow by whole lines.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from sft_lab import directories, errors
from sft_lab.errors import ConfigError, Interrupted, InUse, Pruned, RunError, SftLabError

_RESERVE_BYTES = 1 << 16
RUN_ID = secrets.token_hex(2)  # of this process; keeps two runs started in one second apart


def now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json(value: Any) -> str:
    """Indented JSON that a person can read; with escapes where a text (a file's name, say) is no valid Unicode."""
    value = finite(value)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return text if not _SURROGATE.search(text) else json.dumps(value, indent=2, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with null for each number that JSON does not have: NaN and the infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value


_SURROGATE = re.compile("[\ud800-\udfff]")


def write_json(path: Path, value: Any) -> None:
    write_text(path, to_json(value) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def whole_directory(path: Path, *marks: str) -> Iterator[Path]:
    """A temporary directory to fill, renamed to `path` when the block ends well.

    Args:
        marks: files of which one shows that what was there is ours, and may be replaced.

    Raises:
        ConfigError: something else is there.
    """
    directories.require_replaceable(path, *marks)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if path.exists():
            directories.require_replaceable(path, *marks)
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_directory(source: Path, target: Path) -> None:
    """Hard links in `target` to the files of `source`, copies where it lies on another file system."""
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)


_HELD: set[IO[str]] = set()  # the locks of this process


def _let_go() -> None:
    """A loader's worker lives on for seconds after a killed run, and must not hold its lock."""
    for file in _HELD:
        file.close()
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


class RunDirectory:
    """Paths and states of one run. Nothing is created before `claim`."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).resolve()
        self.config = self.path / "config.yaml"
        self.overrides = self.path / "overrides.yaml"
        self.provenance = self.path / "provenance.json"
        self.preflight = self.path / "preflight.json"
        self.status = self.path / "status.json"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.samples = self.path / "samples.jsonl"
        self.log = self.path / "train.log"
        self.data = self.path / "data"
        self.answers_before = self.data / "answers_before.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.wandb = self.path / "wandb"
        self.verdict = self.path / ".verdict.json"
        self._lock: IO[str] | None = None

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """The directory of a run that exists.

        Raises:
            ConfigError: there is none at `path`.
        """
        run = cls(path)
        if not run.path.is_dir():
            raise ConfigError(f"{path}: no such run directory")
        if not run.config.is_file():
            raise ConfigError(f"{path}: not a run directory, it has no {run.config.name}")
        if not directories.is_config(run.config):
            raise ConfigError(f"{path}: not a run directory, its {run.config.name} is not that of a run")
        return run

    def lock(self) -> None:
        """Hold the run for this process until it ends, however it ends.

        Raises:
            InUse: another process holds it.
        """
        file = open(self.path / ".lock", "w", encoding="utf-8")  # noqa: SIM115  held until the process ends
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InUse(f"{self.path}: this run is in use by another process") from None
        self._lock = file
        _HELD.add(file)

    @property
    def in_use(self) -> bool:
        """Whether a process holds the run now."""
        try:
            self.lock()
        except InUse:
            return True
        except FileNotFoundError:
            return False
        self.unlock()
        return False

    def unlock(self) -> None:
        if self._lock is not None:
            _HELD.discard(self._lock)
            self._lock.close()
            self._lock = None

    def keep_reserve(self) -> None:
        """Hold some of the disk back, so that when it is full the run can still say so.

        Raises:
            RunError: it is full already.
        """
        reserve = self.path / ".reserve"
        if reserve.exists() and reserve.stat().st_size == _RESERVE_BYTES:
            return
        try:
            reserve.write_bytes(os.urandom(_RESERVE_BYTES))  # numbers that no file system makes smaller
        except OSError as error:
            self.spend_reserve()
            raise RunError(f"{self.path}: nothing can be written here ({error.strerror}): make room") from error

    def spend_reserve(self) -> None:
        (self.path / ".reserve").unlink(missing_ok=True)

    def require_free(self) -> None:
        """
        Raises:
            ConfigError: the directory holds a run already, or anything else that is not ours.
        """
        if directories.is_config(self.config):
            raise ConfigError(
                f"{self.path}: holds a run already; go on with it by `python -m sft_lab resume {self.path}`, "
                "or give another hydra.run.dir or sweep.name"
            )
        directories.require_for_run(self.path)

    def require_begun(self) -> None:
        """
        Raises:
            ConfigError: there is more in the directory than a run's config, and no status of a run.
        """
        if directories.is_status(self.status):
            return
        left = [e for e in self.path.iterdir() if e != self.config]
        if not all(directories.left_by_run(entry) for entry in left):
            raise ConfigError(
                f"{self.path}: has the {self.config.name} of a run and no {self.status.name} of one, so what else lies "
                "there is not touched (allowed: a run directory, whole)"
            )

    def claim(self) -> None:
        """Make the directory this run's own.

        Raises:
            ConfigError: it already holds a run, or another process is starting one in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock()
        try:
            self.require_free()
        except ConfigError:
            self.unlock()
            raise
        self.keep_reserve()

    def set_status(self, state: str, **fields: Any) -> None:
        """Merge `fields` into status.json; the states are running, completed, failed and interrupted."""
        status = {"state": state, "error": None, "started_at": None, "ended_at": None, "step": 0}
        if self.status.exists():
            status |= read_json(self.status)
        status |= {"state": state, "error": None} | fields
        if state != "running":
            status["ended_at"] = now()
            self.spend_reserve()
        write_json(self.status, status)

    @property
    def completed(self) -> bool:
        """Whether it has come to its end, which nothing that happens to its processes afterwards changes."""
        return self.status.exists() and bool(read_json(self.status)["state"] == "completed")

    def append_metrics(self, event: dict[str, Any]) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite(event), allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The logged events; a last line torn by a killed process is left out."""
        if not self.metrics.exists():
            return []
        events = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                events.append(json.loads(line))
        return events

    def rewind_metrics(self, count: int) -> None:
        """Keep the first `count` events, those of before the place from which a resumed run goes on."""
        write_text(self.metrics, "".join(json.dumps(event) + "\n" for event in self.read_metrics()[:count]))

    def write_verdict(self, error: SftLabError) -> None:
        """How the ranks ended, for who started them; the first word counts."""
        if not self.verdict.exists():
            word: dict[str, Any] = {"error": type(error).__name__, "arguments": [str(error)]}
            if isinstance(error, Interrupted):
                word["arguments"] = [error.signum]
            elif isinstance(error, Pruned):
                word["arguments"] = [error.step, error.reason]
            write_json(self.verdict, word)

    def clear_verdict(self) -> None:
        self.verdict.unlink(missing_ok=True)

    def raise_verdict(self) -> None:
        """
        Raises:
            SftLabError: the one that the ranks ended with, if it was one.
        """
        if self.verdict.exists():
            word = read_json(self.verdict)
            raise getattr(errors, word["error"])(*word["arguments"])

    def require_adapter(self) -> Path:
        """The finished run's adapter (or, for peft=none, its model).

        Raises:
            RunError: the run has not got so far.
        """
        if not self.adapter.is_dir():
            state = read_json(self.status)["state"] if self.status.exists() else "unknown"
            raise RunError(
                f"{self.path}: no adapter yet, the run's state is {state}; "
                f"`python -m sft_lab resume {self.path}` goes on with it"
            )
        return self.adapter
