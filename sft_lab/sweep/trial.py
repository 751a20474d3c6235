"""One trial of a sweep, in whichever process: `python -m sft_lab.sweep.trial SWEEP TRIAL` in one of its own.

A trial never disturbs the others: what goes wrong in it is written into its directory and told, not raised.
"""

from __future__ import annotations

import gc
import logging
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Protocol

from sft_lab import directories, shared
from sft_lab.errors import ConfigError, Interrupted, InUse, SftLabError
from sft_lab.launch import resume, start
from sft_lab.runs import RunDirectory
from sft_lab.sweep.ledger import Outcome, SweepDirectory, Trial

log = logging.getLogger("sft_lab")


def run(sweep: SweepDirectory, trial: str, known: Trial | None = None) -> Outcome:
    """Train a planned trial, or go on with it where it stopped.

    Args:
        known: the trial itself, with its data and preflight, where this process has planned it.

    Raises:
        Interrupted: a signal asks the whole sweep to end.
    """
    directory = sweep.run(trial)
    try:
        callbacks = callbacks_of(directory)
        if directory.config.is_file():
            resume(directory, callbacks)
        else:
            config, typed = (known.config, known.typed) if known else sweep.planned(trial)
            checked = (known.data, known.report) if known and known.data and known.report else None
            start(config, directory, typed, callbacks, checked)
    except Interrupted:
        raise
    except Exception as error:
        return _failed(sweep, trial, error)
    return sweep.outcome(trial)


def callbacks_of(run: RunDirectory) -> list[Any]:
    """Of the Trainer: what reports to the search that a run is a trial of."""
    sweep = SweepDirectory(run.path.parent)
    study = sweep.study_of(run.path.name)
    if study is None:
        return []
    from sft_lab.sweep.pruning import Reporter

    return [Reporter(study, sweep.read()["objective"])]


def _failed(sweep: SweepDirectory, trial: str, error: Exception) -> Outcome:
    """Write down why, where the run could not do so itself, and let go of the model that the error's frames hold."""
    told = str(error) if isinstance(error, SftLabError) else f"{type(error).__name__}: {error}"
    outcome = sweep.outcome(trial)
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    if outcome.done:  # what went wrong came after it was complete
        log.warning("%s: %s", trial, told)
        return outcome
    if isinstance(error, InUse):  # what it says of itself is true
        return Outcome(trial, "failed", told, outcome.step)
    try:
        directory = sweep.run(trial)
        if not (directories.is_config(directory.config) or directories.is_status(directory.status)):
            directory.require_free()
        directory.path.mkdir(exist_ok=True)
        directory.set_status("failed", error=told)
    except (OSError, ConfigError) as full:
        log.warning("%s: its failure could not be written down: %s", trial, full)
    return Outcome(trial, "failed", told, outcome.step)


class Watch(Protocol):
    """Who is told of each trial."""

    def begins(self, trial: Trial) -> None: ...
    def ends(self, outcome: Outcome) -> None: ...


def run_all(trials: Sequence[Trial], sweep: SweepDirectory, watch: Watch) -> None:
    """Every trial in this process, one after another; those of one base model share its weights."""
    for trial in trials:
        watch.begins(trial)
        outcome = run(sweep, trial.id, trial)
        gc.collect()  # a Trainer and its model refer to each other
        shared.verify()
        watch.ends(outcome)


def run_isolated(trials: Sequence[Trial], sweep: SweepDirectory, watch: Watch) -> None:
    """Every trial in a process of its own, one after another."""
    for trial in trials:
        watch.begins(trial)
        command = [sys.executable, "-m", __name__, str(sweep.path), trial.id]
        # in a session of its own: the terminal's Ctrl-C comes from us, once
        with subprocess.Popen(command, start_new_session=True) as process:
            code = _waited_for(process)
        why = f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its exit code is {code}"
        watch.ends(settled(sweep, trial.id, why))


def _waited_for(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a trial's process, which is asked to stop when we are.

    Raises:
        Interrupted: once the trial has saved what it was doing.
    """
    asked = 0
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            asked = signal.SIGINT
            process.send_signal(asked)
        except Interrupted as error:
            asked = error.exit_code - 128
            process.send_signal(asked)
        else:
            break
    if asked or code > 128:
        raise Interrupted(asked or code - 128)
    return code


def settled(sweep: SweepDirectory, trial: str, why: str = "") -> Outcome:
    """What became of a trial whose process has ended; one that could not say so itself is marked as failed.

    One that a process is still at, such as a cluster's job that the launcher no longer waits for, is left to it.
    """
    outcome = sweep.outcome(trial)
    if outcome.state not in ("new", "running"):
        return outcome
    if sweep.run(trial).in_use:
        return Outcome(trial, outcome.state, "its job is still at it", outcome.step)
    if outcome.state == "new" and not why:
        return Outcome(trial, "new", "its job has not begun it")
    return _failed(sweep, trial, SftLabError(why or "its process ended without a word"))


def main(argv: Sequence[str]) -> int:
    sweep, trial = argv
    try:
        return 0 if run(SweepDirectory(sweep), trial).done else 1
    except Interrupted as error:
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
