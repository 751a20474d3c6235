"""A sweep's directory: the one place that knows what lies in it, and who works on it.

TRIAL/             a run directory for each trial
planned/TRIAL.yaml each trial's frozen config: what runs does not change when a file of conf/ does
planned/TRIAL.json where the trial of a search reports to
sweep.json         what ranks the trials, what each of them varies, what was left out
report.html        all of them side by side
study.log          the search's memory, unless it is kept in a database
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sft_lab import config as configs
from sft_lab import directories
from sft_lab.data.prepared import Prepared
from sft_lab.errors import InUse
from sft_lab.findings import Report
from sft_lab.launch import absolute
from sft_lab.runs import RunDirectory, now, read_json, write_json, write_text
from sft_lab.schema import Config

_NOT_TRAINED = ("preflight", "sweep", "tracking")  # sections that change nothing of what comes out


def trial_name(config: Config) -> str:
    """A trial's name: rank and learning rate to be read, a digest of all that it trains to be told apart."""
    trained = {key: value for key, value in configs.to_dict(config).items() if key not in _NOT_TRAINED}
    digest = hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()[:10]
    return f"{config.peft.method}-r{config.peft.r}-lr{config.trainer.learning_rate:g}-{digest}"


@dataclass
class Outcome:
    """What became of a trial; `state` is that of status.json, `pruned` for one that a search gave up, or `new`."""

    trial: str
    state: str
    error: str = ""
    step: int = 0

    @property
    def done(self) -> bool:
        return self.state in ("completed", "pruned")


@dataclass
class Trial:
    """One run of a sweep: its config, and the overrides that make it differ from the others."""

    config: Config
    varied: list[str]
    typed: list[str]
    outcome: Outcome
    data: Prepared | None = None  # of a trial that is still to run
    report: Report | None = None

    @property
    def id(self) -> str:
        return self.outcome.trial

    @property
    def label(self) -> str:
        return " ".join(self.varied) or self.id


class SweepDirectory:
    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).resolve()
        self.name = self.path.name
        self.record = self.path / "sweep.json"
        self.report = self.path / "report.html"
        self.study = self.path / "study.log"
        self._planned = self.path / "planned"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from working on this sweep; the operating system lets go of it however we end.

        A directory in which nothing was written is removed again.

        Raises:
            ConfigError: something lies in it that no sweep wrote.
            InUse: another process has it; says which.
        """
        directories.require_for_sweep(self.path)
        made = [p for p in (self.path, *self.path.parents) if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        file = self._locked()
        try:
            yield
        finally:
            if [p.name for p in self.path.iterdir()] == [".lock"]:
                (self.path / ".lock").unlink()
                for folder in made:
                    if any(folder.iterdir()):
                        break
                    folder.rmdir()
            file.close()

    def _locked(self) -> IO[str]:
        lock = self.path / ".lock"
        while True:
            file = open(lock, "a+", encoding="utf-8")  # noqa: SIM115  held until the sweep ends
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read() or "another process"
                file.close()
                raise InUse(
                    f"sweep.name={self.name} : {holder} is working on it (allowed: another sweep.name, or the same "
                    "command once that has ended)"
                ) from None
            if lock.exists() and os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
                break
            file.close()  # its last holder took it away between our opening and locking it
            self.path.mkdir(parents=True, exist_ok=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now()},")
        file.flush()
        return file

    def run(self, trial: str) -> RunDirectory:
        return RunDirectory(self.path / trial)

    def outcome(self, trial: str) -> Outcome:
        status = self.run(trial).status
        if not directories.is_status(status):
            return Outcome(trial, "new")
        found = read_json(status)
        state = "pruned" if found.get("pruned_at_step") else found["state"]
        return Outcome(trial, state, found.get("error") or "", found.get("step", 0))

    def freeze(self, trials: Sequence[Trial]) -> None:
        """Write down what each trial runs, and what of it varies, whichever process will run it and whenever."""
        self._planned.mkdir(parents=True, exist_ok=True)
        record = self.read()
        for trial in trials:
            write_text(self._planned / f"{trial.id}.yaml", configs.to_yaml(absolute(trial.config)))
            record["trials"][trial.id] = {"overrides": trial.varied, "typed": trial.typed}
        write_json(self.record, record)

    def planned(self, trial: str) -> tuple[Config, list[str]]:
        """A trial's frozen config, and what was typed of it."""
        return configs.load(self._planned / f"{trial}.yaml"), self.read()["trials"][trial]["typed"]

    def report_to(self, trial: str, study: dict[str, Any] | None) -> None:
        """Where a trial reports what it reaches; None for the trial of a grid."""
        file = self._planned / f"{trial}.json"
        if study is None:
            file.unlink(missing_ok=True)
        else:
            write_json(file, study)

    def study_of(self, trial: str) -> dict[str, Any] | None:
        file = self._planned / f"{trial}.json"
        return read_json(file) if file.is_file() else None

    def read(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"name": self.name, "trials": {}, "left_out": []}
        return read_json(self.record) if self.record.is_file() else empty

    def write(self, **fields: Any) -> None:
        write_json(self.record, self.read() | fields)
