"""How much of the objective's variation goes with each parameter."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from sft_lab.sweep.axes import Axis, positions_of
from sft_lab.sweep.ranking import Verdict


@dataclass
class Effect:
    """`share` of the objective's variance, None where each value was tried once."""

    key: str
    share: float | None

    @property
    def told(self) -> str:
        return "one run for each value" if self.share is None else f"{self.share:.0%} of the variance"


def effect_of(verdict: Verdict, axis: Axis) -> Effect:
    """The share of variance that goes with the parameter: epsilon squared of a one-way analysis of variance.

    Unlike eta squared it does not grow with the number of values (T. L. Kelley, PNAS 21, 1935, "An unbiased correlation
    ratio measure").
    """
    groups = _by_cell(verdict, axis)
    everything = [value for group in groups for value in group]
    within = sum(_squares(group) for group in groups)
    df_within, total = len(everything) - len(groups), _squares(everything)
    if df_within < 1:
        return Effect(axis.key, None)
    between = total - within - (len(groups) - 1) * within / df_within
    return Effect(axis.key, max(0.0, between / total) if total else 0.0)


def by_effect(verdict: Verdict, axes: Sequence[Axis]) -> tuple[list[Axis], list[Effect]]:
    """Axes and their effects, the largest first."""
    pairs = [(axis, effect_of(verdict, axis)) for axis in axes]
    pairs.sort(key=lambda pair: -(1.0 if pair[1].share is None else pair[1].share))
    return [axis for axis, _ in pairs], [effect for _, effect in pairs]


def mean_by(verdict: Verdict, axis: Axis) -> list[tuple[float, float, int]]:
    """Of each value, or interval of values: where it lies on the axis, the mean objective, and of how many runs."""
    cells, _ = positions_of(verdict.ranked, axis)
    members: dict[int, list[tuple[float, float]]] = {}
    for cell, record in zip(cells, verdict.ranked, strict=True):
        members.setdefault(cell, []).append((axis.at(record), verdict.value(record)))
    return [
        (statistics.median(x for x, _ in found), statistics.fmean(y for _, y in found), len(found))
        for _, found in sorted(members.items())
    ]


def _by_cell(verdict: Verdict, axis: Axis) -> list[list[float]]:
    groups: dict[int, list[float]] = {}
    for cell, record in zip(positions_of(verdict.ranked, axis)[0], verdict.ranked, strict=True):
        groups.setdefault(cell, []).append(verdict.value(record))
    return list(groups.values())


def _squares(values: Sequence[float]) -> float:
    mean = statistics.fmean(values)
    return sum((value - mean) ** 2 for value in values)
