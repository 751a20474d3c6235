"""Start a run, or go on with one: data and checks first, then training from what the run directory holds."""

from __future__ import annotations

import logging

import yaml

from sft_lab import config as configs
from sft_lab import preflight, provenance, train
from sft_lab.callbacks import Stop
from sft_lab.console import say
from sft_lab.data.prepare import Prepared, prepare
from sft_lab.errors import Interrupted, RunError, SftLabError
from sft_lab.logs import RunLog, run_log
from sft_lab.runs import RunDirectory, read_json, write_json, write_text
from sft_lab.schema import Config

log = logging.getLogger("sft_lab")


def start(config: Config, run: RunDirectory, overrides: list[str]) -> None:
    """A new run in `run`, which is written to once every check has passed.

    Raises:
        SftLabError: with an exit code of 2 the directory is as it was; otherwise status.json tells what happened.
    """
    stop = Stop()
    with stop.listening(), run_log() as messages:
        try:
            run.require_free()
            data = prepare(config)
            report = preflight.check(config, data, run)
        except RunError as error:
            _freeze(config, run, overrides)
            run.set_status("failed", error=str(error))
            raise
        _freeze(config, run, overrides)
        _write_prepared(config, run, data, report)
        _train(run, stop, messages)


def resume(run: RunDirectory) -> None:
    """Go on with a run from its newest whole checkpoint."""
    run.lock()
    if run.status.exists() and read_json(run.status)["state"] == "completed":
        say(f"{run.path} is complete, there is nothing to go on with")
        return
    stop = Stop()
    with stop.listening(), run_log() as messages:
        if not run.data.is_dir():  # it ended before its data was written
            config = configs.load(run.config)
            data = prepare(config)
            _write_prepared(config, run, data, preflight.check(config, data, run))
        run.set_status("running", ended_at=None)
        _train(run, stop, messages)


def _freeze(config: Config, run: RunDirectory, overrides: list[str]) -> None:
    """Claim the directory and write down what was asked for, complete enough to run it again."""
    run.claim()
    write_text(run.overrides, yaml.safe_dump(overrides, allow_unicode=True))
    write_text(run.config, configs.to_yaml(config))


def _write_prepared(config: Config, run: RunDirectory, data: Prepared, report: preflight.Report) -> None:
    write_json(run.preflight, report.as_dict())
    write_json(run.provenance, provenance.collect(config, data))
    data.save(run)


def _train(run: RunDirectory, stop: Stop, messages: RunLog) -> None:
    """Train from the run directory alone, and leave its status true whatever happens."""
    messages.open(run.log)
    try:
        train.run(configs.load(run.config), run, Prepared.load(run), stop)
    except Interrupted as error:
        run.set_status("interrupted", error=str(error))
        say(f"interrupted; `python -m sft_lab resume {run.path}` goes on")
        raise
    except SftLabError as error:
        run.set_status("failed", error=str(error))
        raise
    except Exception as error:
        run.set_status("failed", error=f"{type(error).__name__}: {error}")
        log.error("the run failed", exc_info=True)
        raise RunError(f"{type(error).__name__}: {error} (the traceback is in {run.log})") from error
    finally:
        run.unlock()
