"""Which run is best, and whether that is more than the noise of seeds. Plain arithmetic; reads no file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sft_lab.checks import not_among
from sft_lab.errors import ConfigError
from sft_lab.sweep.differences import differs, is_number, shown
from sft_lab.sweep.records import Comparison, Record
from sft_lab.sweep.student import t_quantile

_SEEDS = ("seed", "data.seed")
_CONFIDENCE = 0.975  # both sides of 5 %
# What changes the rows that are held out, and, for a loss, what a token is.
_EVALUATED_ON = ("data.format", "data.eval_path", "data.eval_split", "data.eval_rows", "data.eval_fraction")
_TRAINED_ON = ("data.source", "data.path", "data.name", "data.split", "data.revision")
_ANSWERS_DEPEND_ON = ("evaluation.rows", "evaluation.max_new_tokens")
_LOSS_DEPENDS_ON = ("model.path", "model.revision", "chat_template.name", "chat_template.path",
                    "chat_template.kwargs", "chat_template.date", "data.loss", "data.on_context_mismatch",
                    "trainer.max_length")  # fmt: skip


@dataclass
class Group:
    """Finished runs whose configs are equal but for the seed; `sd` is the sample standard deviation, None for one."""

    records: list[Record]
    mean: float
    sd: float | None

    @property
    def n(self) -> int:
        return len(self.records)


@dataclass
class Verdict:
    """What a comparison says.

    `kind`: best (ahead by more than the noise), only (one config finished), unknown (ahead, no seed is repeated),
    noise (ahead within the noise of seeds), tie (equal), none (nothing to rank).
    """

    objective: str
    direction: str
    kind: str
    sentence: str
    best: Record | None  # None in a tie, within the noise, and where nothing can be ranked
    leader: Record | None  # the best run of the config with the best mean, whatever the noise
    noise: float | None  # standard deviation over seeds, pooled over the configs with several
    ranked: list[Record]  # by each run's own value, best first
    unranked: list[tuple[Record, str]]  # with why
    groups: list[Group]  # by mean, best first
    notes: list[str] = field(default_factory=list)

    def value(self, record: Record) -> float:
        return record.metrics[self.objective]

    def behind(self, record: Record) -> float:
        """How far a ranked run lies behind the first, in the objective's own unit; never negative."""
        return abs(self.value(record) - self.value(self.ranked[0]))


# ------------------------------------------------------------------------------------------- objective, direction


def allowed_objectives(records: Sequence[Record]) -> list[str]:
    """The metrics of evaluations after training, in the order in which the runs recorded them."""
    names = dict.fromkeys(name for record in records if record.finished for name in record.metrics)
    return [name for name in names if name != "train_loss" and not name.endswith("_before")]


def resolve(comparison: Comparison, objective: str = "", direction: str = "auto") -> tuple[str, str]:
    """The metric to rank by and its direction; "" where the runs share none.

    Args:
        objective: as typed; else the sweeps' own, else eval_loss where every finished run has it.

    Raises:
        ConfigError: a metric that no finished run recorded, or train_loss, which says how well a run fits the rows it
            was trained on, and which a larger rank or learning rate lowers by learning them by heart.
    """
    allowed = allowed_objectives(comparison.records)
    if objective == "train_loss":
        raise ConfigError(not_among("--objective train_loss", "measured on the rows trained on", "", allowed))
    if objective and objective not in allowed:
        raise ConfigError(not_among(f"--objective {objective}", "no finished run has it", objective, allowed))
    own = {sweep.objective: sweep.direction for sweep in comparison.sweeps if sweep.objective}
    finished = [record for record in comparison.records if record.finished]
    if not objective and len(own) == 1:
        objective = next(iter(own))
    elif not objective and all("eval_loss" in record.metrics for record in finished):
        objective = "eval_loss"
    if direction == "auto":
        direction = own.get(objective) or direction_of(objective)
    return objective, direction


def direction_of(objective: str) -> str:
    return "minimize" if objective.endswith("loss") else "maximize"


# --------------------------------------------------------------------------------------------------------- ranking


def judge(comparison: Comparison, objective: str = "", direction: str = "auto") -> Verdict:
    """The verdict on runs and sweeps by what was typed, else by what they say themselves; raises as `resolve` does."""
    return best(comparison.records, *resolve(comparison, objective, direction))


def best(records: Sequence[Record], objective: str, direction: str = "auto") -> Verdict:
    """Rank runs and say which is best, if one is.

    The first config is called best only if its mean is ahead of every other's by more than Fisher's least significant
    difference at 5 %: t(0.975, df) * s * sqrt(1/n1 + 1/n2), with s the standard deviation over seeds pooled over all
    configs with several and df its degrees of freedom (R. A. Fisher, The Design of Experiments, 1935; Montgomery,
    Design and Analysis of Experiments, section 3.5). The pooled s takes the noise to be alike for all configs, which
    is what lets configs with one seed be judged at all.
    """
    direction = direction_of(objective) if direction == "auto" else direction
    sign = 1.0 if direction == "minimize" else -1.0
    ranked, unranked = _split(records, objective)
    ranked.sort(key=lambda record: sign * record.metrics[objective])
    groups = sorted(_groups(ranked, objective), key=lambda group: sign * group.mean)
    noise, df = _pooled(groups)
    kind, sentence = _judged(groups, objective, noise, df, unranked)
    leader = groups[0].records[0] if groups else None
    named = leader if kind in ("best", "only", "unknown") else None
    notes = _notes(ranked, objective)
    return Verdict(objective, direction, kind, sentence, named, leader, noise, ranked, unranked, groups, notes)


def _split(records: Sequence[Record], objective: str) -> tuple[list[Record], list[tuple[Record, str]]]:
    ranked, unranked = [], []
    for record in records:
        value = record.metrics.get(objective)
        if not record.finished:
            unranked.append((record, record.why or record.state))
        elif value is None:
            unranked.append((record, f"has no {objective}" if objective else "nothing to rank by"))
        elif not math.isfinite(value):
            unranked.append((record, f"{objective} is {value}"))
        else:
            ranked.append(record)
    return ranked, unranked


def without_seed(record: Record) -> str:
    """What tells a config from others, but for its seeds."""
    return repr(sorted((key, shown(value)) for key, value in record.config.items() if key not in _SEEDS))


def _groups(ranked: Sequence[Record], objective: str) -> list[Group]:
    """Runs that differ in the seed; a data.seed of its own is another config, one that follows the seed is not.

    Beside runs of data.seed=42 whatever their seed is, the one of seed=42 is one of them.
    """
    keys = [without_seed(record) if record.config else str(record.path) for record in ranked]
    data_seeds = [shown(record.config.get("data.seed")) for record in ranked]
    follows = [shown(record.config.get("seed")) == seed for record, seed in zip(ranked, data_seeds, strict=True)]
    fixed = {(key, seed) for key, seed, follow in zip(keys, data_seeds, follows, strict=True) if not follow}
    members: dict[tuple[str, str | None], list[Record]] = {}
    for key, seed, record in zip(keys, data_seeds, ranked, strict=True):
        members.setdefault((key, seed if (key, seed) in fixed else None), []).append(record)
    groups = []
    for same in members.values():
        values = [record.metrics[objective] for record in same]
        groups.append(Group(same, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None))
    return groups


def _pooled(groups: Sequence[Group]) -> tuple[float | None, int]:
    """The standard deviation over seeds from all groups with several, and its degrees of freedom."""
    repeated = [(group.n - 1, group.sd) for group in groups if group.sd is not None]
    df = sum(n for n, _ in repeated)
    return (math.sqrt(sum(n * sd**2 for n, sd in repeated) / df), df) if df else (None, 0)


def _judged(
    groups: Sequence[Group], objective: str, noise: float | None, df: int, unranked: Sequence[tuple[Record, str]]
) -> tuple[str, str]:
    if not groups:
        what = objective or "a metric of an evaluation that every finished run has (--objective NAME takes another)"
        return "none", f"Nothing can be ranked: no finished run has {what}." if objective else (
            f"Nothing can be ranked: there is no {what}."
        )
    first, name = groups[0], _called(groups[0])
    at = f"{objective} {_average(first)}"
    if len(groups) == 1:
        return "only", f"{name} ({at}) is the only config that finished; there is none to compare it with."
    equal = [group for group in groups if math.isclose(group.mean, first.mean)]
    if len(equal) > 1:
        return "tie", f"No best: {_listed([_called(group) for group in equal])} tie at {at}."
    if noise is None:
        return "unknown", (
            f"{name} ({at}) is {_ahead(first, groups[1])}; how much of that is noise is unknown, since no config ran "
            "with several seeds."
        )
    rivals = [group for group in groups[1:] if abs(first.mean - group.mean) <= _margin(noise, df, first, group)]
    if rivals:
        several = f"; {len(rivals)} configs cannot be told from it" if len(rivals) > 1 else ""
        return "noise", (
            f"No best: {name} ({at}) is {_ahead(first, rivals[0])}, within the noise of seeds "
            f"({_margin(noise, df, first, rivals[0]):.2g} would be more){several}."
        )
    margin = _margin(noise, df, first, groups[1])
    return "best", f"Best: {name} ({at}), {_ahead(first, groups[1])}, more than the noise of seeds ({margin:.2g})."


def _ahead(first: Group, other: Group) -> str:
    return f"ahead of {_called(other)} ({_average(other)}) by {abs(first.mean - other.mean):.4g}"


def _margin(noise: float, df: int, first: Group, second: Group) -> float:
    return t_quantile(_CONFIDENCE, df) * noise * math.sqrt(1 / first.n + 1 / second.n)


def _called(group: Group) -> str:
    others = {1: "", 2: " and its other seed"}.get(group.n, f" and its {group.n - 1} other seeds")
    return group.records[0].name + others


def _average(group: Group) -> str:
    return f"{group.mean:.4f}" + (" on average" if group.n > 1 else "")


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _notes(ranked: Sequence[Record], objective: str) -> list[str]:
    keys = (*_EVALUATED_ON, *(_LOSS_DEPENDS_ON if objective.endswith("loss") else _ANSWERS_DEPEND_ON))
    differ = [*_held_out_by(ranked), *(key for key in keys if differs(ranked, key))]
    if not differ:
        return []
    hint = " data.seed=42 in all of them holds the same rows out." if "data.seed" in differ else ""
    return [f"{objective} was not measured alike in all runs: they differ in {', '.join(differ)}.{hint}"]


def _held_out_by(ranked: Sequence[Record]) -> list[str]:
    """What differs in where held-out rows come from, of the runs that have no file of their own for them.

    Which rows those are data.seed decides, unless a split of their own holds them; data=requests makes them by it.
    """
    taken = [record for record in ranked if not record.config.get("data.eval_path")]
    keys = dict.fromkeys(key for record in taken for key in record.config if key.startswith("data.sources."))
    sources = [key for key in keys if not key.endswith(".weight")]  # how often rows are trained on
    differ = [key for key in (*_TRAINED_ON, *sources) if differs(taken, key)]
    # a source that a run lacks is named once
    differ = [key for key in differ if key.endswith(".path") or all(key in record.config for record in taken)]
    drawn = [record for record in taken if _draws(record.config)]
    return [*differ, *(["data.seed"] if differs(drawn, "data.seed") else [])]


def _draws(config: dict[str, Any]) -> bool:
    counts: list[Any] = [config.get("data.eval_rows"), config.get("data.eval_fraction")]
    return not config.get("data.eval_split") and any(count > 0 for count in counts if is_number(count))
