"""The story of one sweep: plan, tell, run what is left, put side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from sft_lab import checks, shared, wandb_sweep
from sft_lab import model as models
from sft_lab.console import say
from sft_lab.errors import ConfigError, Interrupted, RunError
from sft_lab.logs import run_log
from sft_lab.schema import SweepConfig, TrackingConfig
from sft_lab.sweep import plan as plans
from sft_lab.sweep import ranking, records, report, table, terminal
from sft_lab.sweep.differences import shown
from sft_lab.sweep.ledger import Outcome, SweepDirectory, Trial
from sft_lab.sweep.plan import Candidate, Plan
from sft_lab.sweep.ranking import Verdict
from sft_lab.sweep.records import Comparison

log = logging.getLogger("sft_lab")


class Sweeper(Protocol):
    """What a sweep needs of Hydra's side."""

    @property
    def directory(self) -> SweepDirectory: ...
    @property
    def settings(self) -> SweepConfig: ...
    @property
    def elsewhere(self) -> bool: ...
    def launch(self, trials: Sequence[Trial], watch: Watch) -> None: ...


class Watch:
    """Tells of each trial as it begins and ends, and keeps what became of it."""

    def __init__(self, before: dict[str, Outcome], total: int):
        self.outcomes = before
        self._number, self._total = sum(outcome.done for outcome in self.outcomes.values()), total

    def begins(self, trial: Trial) -> None:
        self._number += 1
        say(f"trial {self._number}/{self._total}: {trial.label}")

    def ends(self, outcome: Outcome) -> None:
        self.outcomes[outcome.trial] = outcome
        if not outcome.done:
            say(f"trial {outcome.trial} {outcome.state}: {outcome.error}")


def grid(candidates: Iterable[Candidate], sweeper: Sweeper) -> None:
    """All trials, each once; those that are done already count as they are.

    Raises:
        ConfigError: a trial cannot run, or another process works on the sweep; nothing was started.
        RunError: some trials failed; the others are done.
        Interrupted: a signal ended it; the same command goes on.
    """
    sweep, settings = sweeper.directory, sweeper.settings
    with sweep.held():
        plan = drawn_up(candidates, sweeper)
        if settings.dry_run:
            return
        begin(sweep, settings, plan.left_out, sampler="")
        sweep.freeze(plan.to_run)
        for trial in plan.to_run:
            sweep.report_to(trial.id, None)
        watch = Watch({trial.id: trial.outcome for trial in plan.trials}, len(plan.trials))
        with under_way():
            sweeper.launch(in_order(plan.to_run), watch)
        finish(watch.outcomes, plan.trials[0], sweeper)


def drawn_up(candidates: Iterable[Candidate], sweeper: Sweeper, told: Callable[[Plan], str] | None = None) -> Plan:
    """The plan of a sweep, told at the terminal: as a table, or by the sentence that `told` gives."""
    sweep, settings = sweeper.directory, sweeper.settings
    if "WANDB_SWEEP_ID" in os.environ:
        raise ConfigError("-m : under a W&B agent all trials would be the one run that it began (allowed: no -m)")
    with run_log():
        plan = plans.draw_up(candidates, sweep, settings.on_bad_trial, sweeper.elsewhere)
        require_objective(settings, plan.trials)
        if told is None:
            plans.tell(plan, sweep)
        else:
            plans.tell_left_out(plan)
            say(told(plan))
    return plan


def require_objective(settings: SweepConfig, trials: Sequence[Trial]) -> None:
    """
    Raises:
        ConfigError: what is to rank the trials is measured in none of them.
    """
    if settings.objective == "none":
        return
    if any(not trial.report.numbers["eval_rows"] for trial in trials if trial.report):
        raise ConfigError(
            f"sweep.objective={settings.objective} : no rows are held out to measure it on (allowed: data.eval_rows=N, "
            "data.eval_path=FILE; or sweep.objective=none, which ranks nothing)"
        )
    configs = [trial.config for trial in trials]
    measured = {"eval_loss", "none"}.union(*(config.data.metrics for config in configs if config.evaluation.rows))
    if settings.objective == "train_loss":
        raise ConfigError(
            "sweep.objective=train_loss : falls the more, the more is learned by heart "
            f"(allowed: {', '.join(sorted(measured))})"
        )
    if settings.objective not in measured:
        raise ConfigError(
            checks.not_among(f"sweep.objective={settings.objective}", "is not measured", settings.objective, measured)
        )


def direction(settings: SweepConfig) -> str:
    return ranking.direction_of(settings.objective) if settings.direction == "auto" else settings.direction


def begin(sweep: SweepDirectory, settings: SweepConfig, left_out: list[dict[str, Any]], sampler: str) -> None:
    """
    Raises:
        ConfigError: the sweep was begun by another sampler, or ranked by something else.
    """
    objective = "" if settings.objective == "none" else settings.objective
    now = {"objective": objective, "direction": direction(settings), "sampler": sampler}
    before = sweep.read()
    other = [key for key in now if before.get(key) not in (None, now[key])]
    if "sampler" in other or (sampler and other):  # a grid may be ranked by something else; a study may not
        raise ConfigError(
            f"sweep.name={sweep.name} : was begun with "
            + ", ".join(f"{key} {before[key] or 'none'}" for key in other)
            + " (allowed: the same, or another sweep.name)"
        )
    sweep.write(**now, left_out=left_out)


def in_order(trials: Sequence[Trial]) -> list[Trial]:
    """Those of one base model one after another, so that its weights are read once."""
    keys = [(t.config.model.path, t.config.quant.method, models.resolve_attention(t.config)) for t in trials]
    first = {key: keys.index(key) for key in keys}
    return [trial for _, trial in sorted(zip(keys, trials, strict=True), key=lambda pair: first[pair[0]])]


@contextlib.contextmanager
def under_way() -> Iterator[None]:
    """Trials share what is the same; a signal between two of them ends the sweep as one within them does."""

    def leave(signum: int, frame: Any) -> None:
        raise Interrupted(signum)

    before = {signum: signal.signal(signum, leave) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    try:
        with shared.sharing():
            yield
    except (Interrupted, KeyboardInterrupt):
        say("sweep interrupted; the same command with this sweep.name goes on with it")
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def finish(outcomes: dict[str, Outcome], any_trial: Trial, sweeper: Sweeper) -> None:
    """Put the trials side by side: table, report, W&B.

    Args:
        any_trial: what tracks one, tracks the sweep, but for the tags that say what it varies.

    Raises:
        RunError: some failed, or are under way without us.
    """
    sweep = sweeper.directory
    if not outcomes:
        raise RunError(f"sweep {sweep.name}: no trial could run")
    comparison = records.read([sweep.path])
    verdict = ranking.judge(comparison)
    terminal.show(comparison, verdict)
    terminal.say_verdict(verdict)
    try:
        report.write(comparison, verdict, sweep.report)
        say(f"report: {sweep.report}")
    except OSError as error:  # a full disk, say: the trials are what they are
        say(f"no report: {error}")
    tracking = any_trial.config.tracking
    shared_tags = [tag for tag in tracking.tags if tag not in any_trial.varied]
    _track(dataclasses.replace(tracking, tags=shared_tags), sweep, sweeper.settings, comparison, verdict)
    states = [outcome.state for outcome in outcomes.values()]
    waiting = sum(state in ("new", "running") for state in states)
    failed = sum(state in ("failed", "interrupted") for state in states)
    if failed or waiting:
        counts = [f"{failed} of {len(states)} trials failed"] if failed else []
        counts += [f"{waiting} of {len(states)} are not done yet"] if waiting else []
        raise RunError(f"sweep {sweep.name}: {', '.join(counts)}; the same command tries again what is not done")


def _track(
    tracking: TrackingConfig, sweep: SweepDirectory, settings: SweepConfig, comparison: Comparison, verdict: Verdict
) -> None:
    """The sweep's own run in W&B; an adapter is its best only where it is ahead of the others."""
    rows = table.rows(comparison, verdict)
    columns = ["rank", "name", "state", *comparison.keys, *table.metric_names(comparison, verdict), *table.COSTS]
    values = [row | {key: shown(value) for key, value in row["config"].items()} | row["metrics"] for row in rows]
    best = verdict.best
    metadata = {"verdict": verdict.sentence, "metrics": best.metrics, "config": best.config} if best else {}
    told = wandb_sweep.record_sweep(
        tracking,
        sweep.path,
        sweep.name,
        columns,
        [[row.get(column) for column in columns] for row in values],
        report=sweep.report if sweep.report.is_file() else None,
        best=(best.path / "adapter", best.name, metadata) if best else None,
        link_to=settings.link_best_to,
        summary={
            "objective": verdict.objective,
            "direction": verdict.direction,
            "trials": len(rows),
            "verdict": verdict.sentence,
            **({f"best/{name}": value for name, value in best.metrics.items()} if best else {}),
        },
    )
    if told:
        say(told)
