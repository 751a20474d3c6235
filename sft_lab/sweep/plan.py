"""A sweep before it costs anything: every trial checked, doubled ones merged, the whole cost told."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_lab import checkpoints, console, directories, preflight
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.errors import ConfigError, PreflightError, RunError
from sft_lab.runs import read_json
from sft_lab.schema import Config
from sft_lab.sweep import cost
from sft_lab.sweep.ledger import Outcome, SweepDirectory, Trial, trial_name

_LISTED = 40  # trials in the table of a plan; the others are counted


@dataclass
class Candidate:
    """A trial as it was composed: its config, or what is wrong with it."""

    varied: list[str]
    typed: list[str]
    config: Config | None
    problems: list[str]


class Preparations:
    """The data of trials, made once for all that train on the same."""

    def __init__(self) -> None:
        self._made: dict[str, Prepared] = {}

    def of(self, config: Config) -> Prepared:
        """Raises what `prepare` raises."""
        sections = dataclasses.asdict(config)
        needs = [sections["data"], sections["model"], sections["chat_template"], config.trainer.max_length]
        key = json.dumps(needs, sort_keys=True)
        if key not in self._made:
            self._made[key] = prepare(config)
        return self._made[key]


@dataclass
class Plan:
    trials: list[Trial] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)  # {overrides, reason} of trials that cannot run
    merged: int = 0
    elsewhere: bool = False  # whether other machines than this one are to train them
    prepared: Preparations = field(default_factory=Preparations)

    @property
    def to_run(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.outcome.done]


def draw_up(candidates: Iterable[Candidate], sweep: SweepDirectory, on_bad_trial: str, elsewhere: bool) -> Plan:
    """Check every candidate, the finished ones' data too.

    Args:
        elsewhere: other machines than this one are to train them.

    Raises:
        ConfigError: a trial that cannot run, with on_bad_trial=error; or none that can.
    """
    plan, seen = Plan(elsewhere=elsewhere), set()
    for candidate in candidates:
        name = trial_name(candidate.config) if candidate.config else None
        if name in seen:
            plan.merged += 1
            continue
        trial = checked(candidate, sweep, plan.prepared, elsewhere)
        if trial is None:
            plan.left_out.append(left_out(candidate))
        else:
            plan.trials.append(trial)
            seen.add(trial.id)
    if plan.left_out and (on_bad_trial == "error" or not plan.trials):
        raise ConfigError(
            [f"trial {' '.join(bad['overrides'])} : {bad['reason']}" for bad in plan.left_out]
            + ["no trial was started (sweep.on_bad_trial=skip leaves such ones out)"]
        )
    _require_disk(plan, sweep)
    return plan


def left_out(candidate: Candidate) -> dict[str, Any]:
    return {"overrides": candidate.varied, "reason": "; ".join(candidate.problems)}


def checked(candidate: Candidate, sweep: SweepDirectory, prepared: Preparations, elsewhere: bool) -> Trial | None:
    """The trial with its data and preflight; None where it cannot run, and `candidate.problems` says why."""
    if candidate.config is None:
        return None
    outcome = sweep.outcome(trial_name(candidate.config))
    trial = Trial(candidate.config, candidate.varied, candidate.typed, outcome)
    candidate.problems = _problems(trial, sweep, prepared, elsewhere)
    return None if candidate.problems else trial


def _problems(trial: Trial, sweep: SweepDirectory, prepared: Preparations, elsewhere: bool) -> list[str]:
    """What keeps a trial from running; fills in its data and report where nothing does."""
    try:
        run = sweep.run(trial.id)
        if trial.outcome.state == "new" and not directories.is_config(run.config):
            run.require_free()
        data = prepared.of(trial.config)
        recorded = read_json(run.preflight)["data_fingerprint"] if run.preflight.is_file() else None
        if recorded not in (None, data.facts["data_fingerprint"]):
            return [f"{run.path} holds a run on data that has changed since (allowed: another sweep.name)"]
        if not trial.outcome.done:
            trial.config.chat_template.date = data.template.date  # of all trials the same, whenever they train
            trial.data, trial.report = data, preflight.examine(trial.config, data, run, elsewhere)
            return trial.report.errors
    except (ConfigError, PreflightError) as error:
        return error.problems
    except RunError as error:
        return [str(error)]
    return []


def _require_disk(plan: Plan, sweep: SweepDirectory) -> None:
    """
    Raises:
        ConfigError: there is no room for what all trials leave behind.
    """
    needed, free = _disk_bytes(plan.to_run, sweep), _free_bytes(sweep)
    if needed > free:
        raise ConfigError(
            f"sweep.name={sweep.name} : {len(plan.to_run)} trials need {needed / 1e6:.1f} MB, "
            f"{sweep.path} has {free / 1e6:.1f} MB (allowed: fewer trials, or a smaller "
            "trainer.save_total_limit)"
        )


def _disk_bytes(trials: Sequence[Trial], sweep: SweepDirectory) -> int:
    """What they still need beside what they have saved."""
    needed = ((t.report.numbers["disk_bytes"], sweep.run(t.id)) for t in trials if t.report)
    return sum(max(0, disk - checkpoints.saved_bytes(run)) for disk, run in needed)


def _free_bytes(sweep: SweepDirectory) -> int:
    place = next(p for p in (sweep.path, *sweep.path.parents) if p.exists())
    return shutil.disk_usage(place).free


# ------------------------------------------------------------------------------------------------------ telling it


def tell(plan: Plan, sweep: SweepDirectory) -> None:
    """The plan as a table, and its cost in a line."""
    console.show_table(["trial", "what becomes of it", "steps", "about s"], _rows(plan))
    if len(plan.trials) > _LISTED:
        console.say(f"and {len(plan.trials) - _LISTED} trials more")
    tell_left_out(plan)
    console.say(summary(plan, sweep))


def tell_left_out(plan: Plan) -> None:
    for bad in plan.left_out:
        console.say(f"left out: {' '.join(bad['overrides'])}: {bad['reason']}")


def _rows(plan: Plan) -> list[list[str]]:
    rows = []
    for trial in plan.trials[:_LISTED]:
        numbers = trial.report.numbers if trial.report else {}
        seconds = "" if plan.elsewhere or not numbers else f"{cost.training_s(trial.config, numbers):.0f}"
        rows.append([trial.label, _what_becomes(trial.outcome), str(numbers.get("steps", "")), seconds])
    return rows


def _hours(plan: Plan, parts: Iterable[tuple[Trial, float]]) -> str:
    """Of so much of each trial, in words; nothing where other machines train, whose speed nobody knows here."""
    if plan.elsewhere:
        return ""
    seconds = sum(cost.training_s(trial.config, trial.report.numbers) * part for trial, part in parts if trial.report)
    return f"about {seconds / 3600:.2g} h of training one after another, "


def summary(plan: Plan, sweep: SweepDirectory) -> str:
    """The whole cost: trials, steps, hours and disk."""
    left = plan.to_run
    of_steps = [(trial, trial.report.numbers["steps"]) for trial in left if trial.report]
    steps = sum(of - trial.outcome.step for trial, of in of_steps)
    hours = _hours(plan, ((trial, 1 - trial.outcome.step / of) for trial, of in of_steps))
    counts = [f"{len(left)} to train", f"{len(plan.trials) - len(left)} done"]
    counts += [f"{plan.merged} the same as another"] if plan.merged else []
    counts += [f"{len(plan.left_out)} left out"] if plan.left_out else []
    return (
        f"sweep {sweep.name}: {len(plan.trials)} trials ({', '.join(counts)}); {steps} steps, {hours}"
        f"{_disk_bytes(left, sweep) / 1e6:.0f} MB of {_free_bytes(sweep) / 1e9:.0f} GB free; in {sweep.path}"
    )


def cost_of_search(plan: Plan, sweep: SweepDirectory, n_trials: int, left: int) -> str:
    """The same of trials that are not known yet, as the corners of their space are on average."""
    reports = [trial.report.numbers for trial in plan.trials if trial.report]
    if not reports:
        return f"search {sweep.name}: {n_trials} trials ({left} to train); in {sweep.path}"
    share = left / len(reports)
    steps, disk = (sum(numbers[key] for numbers in reports) * share for key in ("steps", "disk_bytes"))
    hours = _hours(plan, ((trial, share) for trial in plan.trials))
    return (
        f"search {sweep.name}: {n_trials} trials ({left} to train); about {steps:.0f} steps, {hours}"
        f"{disk / 1e6:.0f} MB of {_free_bytes(sweep) / 1e9:.0f} GB free; in {sweep.path}"
    )


def _what_becomes(outcome: Outcome) -> str:
    if outcome.done:
        return f"done ({outcome.state})"
    if outcome.state == "new":
        return "new"
    return f"{outcome.state}, goes on" + (f" from step {outcome.step}" if outcome.step else "")
