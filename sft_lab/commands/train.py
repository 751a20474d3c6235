"""`train`, or no verb: checks what was typed, then hands over to Hydra."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sft_lab import command_line, composing, meetings
from sft_lab import config as configs
from sft_lab.errors import ConfigError, Interrupted, Leave, SftLabError
from sft_lab.options import CONF_DIR
from sft_lab.runs import RunDirectory


def main(argv: Sequence[str]) -> int:
    command = command_line.parse(argv)
    run_dir = command_line.check(command) if command.composes else None
    missing = {p.resolve() for p in run_dir.parents if not p.exists()} if run_dir else set()
    theirs = {run_dir.resolve()} if run_dir and run_dir.exists() else set()  # made, and left empty, by the user

    def task(cfg: DictConfig) -> None:
        try:
            _run_one(cfg)
        except SftLabError as error:
            _discard_empty(Path(HydraConfig.get().runtime.output_dir), missing, theirs)
            raise Leave(error) from error

    composing.register()
    if command.composes and (meeting := meetings.current()):
        if command.multirun:
            raise ConfigError(
                f"-m : {meeting.group.by} started this command {meeting.group.count} times, and a sweep starts the "
                "ranks of its trials itself (allowed: to start it once)"
            )
        earlier = meeting.earlier_run()
        if earlier and RunDirectory(earlier).config.is_file():  # else it was no run yet
            from sft_lab.launch import resume

            resume(RunDirectory(earlier))
            return 0
    if run_dir and not meetings.current():  # of several processes one has begun it, perhaps
        RunDirectory(run_dir).require_free()
    if command.composes and command.multirun:
        from sft_lab.sweep import sweepers

        sweepers.register()
        task = run_trial
    sys.argv = ["sft_lab", *argv]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="config")(task)()
    except Leave as leave:
        raise leave.error from None
    return 0


def run_trial(cfg: DictConfig) -> None:
    """A sweep's trial, in a process that one of Hydra's launchers started: it was planned, and frozen then."""
    from sft_lab import worker
    from sft_lab.sweep import trial
    from sft_lab.sweep.ledger import SweepDirectory

    directory = Path(HydraConfig.get().runtime.output_dir)
    meeting = meetings.current()
    if meeting is not None and not meeting.group.leads:  # one of several tasks, on as many nodes, of this trial's job
        worker.follow()
        return
    try:
        trial.run(SweepDirectory(directory.parent), directory.name)
    except Interrupted as interrupted:  # its directory says so; the launcher would take it for a failure of all
        if interrupted.warned and callable(signal.getsignal(interrupted.signum)):
            signal.raise_signal(interrupted.signum)  # submitit's, which puts the job back into the queue
    finally:
        if meeting is not None:
            meeting.dismiss(0)


def _run_one(cfg: DictConfig) -> None:
    config = configs.to_config(cfg)
    from sft_lab.launch import start

    start(config, RunDirectory(HydraConfig.get().runtime.output_dir), list(HydraConfig.get().overrides.task))


def _discard_empty(run_dir: Path, missing: set[Path], theirs: set[Path]) -> None:
    """Undo the directories that Hydra made for a run that was refused before it wrote anything."""
    for folder in (p for p in (run_dir, *run_dir.parents) if p in missing or (p == run_dir and p not in theirs)):
        if any(folder.iterdir()):
            return
        folder.rmdir()
