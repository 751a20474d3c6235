"""Start a run, or go on with one: data and checks first, then training from what the run directory holds."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from sft_lab import agent, checkpoints, drift, meetings, outside, preflight, provenance, train, worker
from sft_lab import config as configs
from sft_lab import model as models
from sft_lab.callbacks import Stop
from sft_lab.console import say
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.errors import ConfigError, Interrupted, PreflightError, Pruned, RunError, SftLabError
from sft_lab.findings import Report
from sft_lab.logs import RunLog, run_log
from sft_lab.runs import RunDirectory, now, write_json, write_text
from sft_lab.schema import Config

log = logging.getLogger("sft_lab")


def start(
    config: Config,
    run: RunDirectory,
    overrides: list[str],
    callbacks: Sequence[Any] = (),
    checked: tuple[Prepared, Report] | None = None,
) -> None:
    """A new run in `run`, which is written to once every check has passed.

    Args:
        callbacks: of the Trainer, besides our own.
        checked: the run's data and its preflight, where they are made already.

    Raises:
        SftLabError: with an exit code of 2 the directory is as it was; otherwise status.json tells what happened.
    """
    stop = Stop()
    with stop.listening(), run_log() as messages:
        try:
            run.require_free()
            outside.require_room(config.distributed)
            data, report = checked or _checked(config, run)
        except (ConfigError, PreflightError, Interrupted):
            raise
        except Exception as error:
            told = error if isinstance(error, RunError) else RunError(f"{type(error).__name__}: {error}")
            _freeze(config, run, overrides)
            messages.open(run.log)
            log.error("the run failed", exc_info=True)
            run.set_status("failed", error=str(told))
            raise told from error
        _freeze(config, run, overrides)
        with _recorded(run, messages):
            _write_prepared(config, run, data, report)
            _train(run, stop, callbacks)


def resume(run: RunDirectory, callbacks: Sequence[Any] = (), allowed: Collection[str] = ()) -> None:
    """Go on with a run from its newest whole checkpoint.

    Args:
        allowed: what may have changed since it began, by name: data, model, or a key of the config.

    Raises:
        ConfigError: something else has, or this machine cannot do what the run asks for.
        PreflightError: what it is still to save has no room.
    """
    run.require_begun()
    run.lock()
    if run.completed:
        say(f"{run.path} is complete, there is nothing to go on with")
        run.unlock()
        return
    stop = Stop()
    with stop.listening(), run_log() as messages:
        config = configs.load(run.config)
        try:
            outside.require_room(config.distributed)
            preflight.check_again(config, run)
            drift.require_none(run, config, allowed)
            run.keep_reserve()
        except SftLabError:
            run.unlock()
            raise
        run.set_status("running", ended_at=None, pruned_at_step=None)
        if checkpoints.newest(run)[0] is None:
            say("there is no whole checkpoint: it begins again")
        with _recorded(run, messages):
            if not run.data.is_dir():  # it ended before its data was written
                data, report = _checked(config, run)
                _write_prepared(config, run, data, report)
            _train(run, stop, callbacks)


def _checked(config: Config, run: RunDirectory) -> tuple[Prepared, Report]:
    data = prepare(config)
    config.chat_template.date = data.template.date  # so that the run can be made again on another day
    return data, preflight.check(config, data, run)


def _freeze(config: Config, run: RunDirectory, overrides: list[str]) -> None:
    """Claim the directory and write down what was asked for, complete enough to run it again."""
    run.claim()
    if meeting := meetings.current():
        meeting.note_run(str(run.path))
    write_text(run.overrides, yaml.safe_dump(overrides, allow_unicode=True))
    write_text(run.config, configs.to_yaml(absolute(config)))
    run.set_status("running", started_at=now())


def absolute(config: Config) -> Config:
    """The config with its local paths as they are from any directory."""
    config = copy.deepcopy(config)
    if Path(config.model.path).is_dir():
        config.model.path = str(Path(config.model.path).resolve())
    local = [source for source in (config.data, *config.data.sources.values()) if source.source == "file"]
    for source in local:
        source.path = _from_anywhere(source.path)
    config.data.eval_path = _from_anywhere(config.data.eval_path)
    config.chat_template.path = _from_anywhere(config.chat_template.path)
    return config


def _from_anywhere(path: str) -> str:
    """Links are not followed: what they lead to often has another name, without the ending that tells its kind."""
    return os.path.abspath(Path(path).expanduser()) if path else ""  # noqa: PTH100  resolve() would follow them


def _write_prepared(config: Config, run: RunDirectory, data: Prepared, report: Report) -> None:
    write_json(run.preflight, report.as_dict())
    write_json(run.provenance, provenance.collect(absolute(config), data))
    data.save(run)


def _train(run: RunDirectory, stop: Stop, callbacks: Sequence[Any]) -> None:
    """Train from the run directory alone: in this process, in ranks that it starts, or as one of those it is among."""
    config = configs.load(run.config)
    meeting = meetings.current()
    if config.distributed.method == "single":
        train.run(config, run, Prepared.load(run, config.model.trust_remote_code), stop, callbacks)
        return
    models.fetch(config.model)  # before there are ranks, or other machines, which may share the cache, look for it
    if meeting is None:
        run.clear_verdict()
        agent.run(config, run)  # the ranks find the callbacks themselves
    else:
        each = config.distributed.num_processes // meeting.group.count
        meeting.all_here(config.distributed.timeout_min)
        run.clear_verdict()  # nobody is left who would write another about an attempt before this one
        meeting.send_to_run(str(run.path), each, config.distributed.timeout_min)
        worker.join(meeting, run, each, stop)


@contextlib.contextmanager
def _recorded(run: RunDirectory, messages: RunLog) -> Iterator[None]:
    """Leave the status true whatever happens; what happens to a completed run afterwards does not change it."""
    messages.open(run.log)
    try:
        yield
    except BaseException as error:
        if run.completed:
            raise
        if isinstance(error, Pruned):
            run.set_status("interrupted", error=str(error), step=error.step, pruned_at_step=error.step)
            say(str(error))
            return
        if isinstance(error, (Interrupted, KeyboardInterrupt)):
            run.set_status("interrupted", error=str(error))
            say(f"interrupted; `python -m sft_lab resume {run.path}` goes on")
            raise
        if isinstance(error, SftLabError):
            run.set_status("failed", error=str(error))
            log.error("%s", error, exc_info=True)
            raise
        run.set_status("failed", error=f"{type(error).__name__}: {error}")
        log.error("the run failed", exc_info=True)
        raise RunError(f"{type(error).__name__}: {error} (the traceback is in {run.log})") from error
    finally:
        run.unlock()
