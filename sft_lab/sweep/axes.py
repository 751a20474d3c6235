"""Where the values of a parameter lie on an axis: by value, by its logarithm, or evenly."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_lab.sweep.differences import is_number, shown
from sft_lab.sweep.records import Record

FEW = 8  # values that each get a place of their own
_INTERVALS = 5  # that more numbers than that are put into, for a mean or a cell
_LABELS = 10  # on one axis
_LONGEST = 24  # characters of a label
_DIGITS = 6  # characters that a number may have as it is
_DECADE = 10
_FEW_DRAWN = 5  # values, up to which they are named even if none comes twice


@dataclass
class Axis:
    """The axis of a config key. `places` is None where numbers lie by their value or its logarithm."""

    key: str
    places: dict[str, int] | None  # by the value as shown
    log: bool
    low: float
    high: float

    def at(self, record: Record) -> float:
        value: Any = record.config.get(self.key)
        if self.places is not None:
            return self.places[shown(value)]
        return math.log10(value) if self.log else float(value or 0)

    def ticks(self) -> list[tuple[float, str]]:
        if self.places is not None:
            every = -(-len(self.places) // _LABELS)
            return [(place, short(value)) for value, place in self.places.items() if place % every == 0]
        if self.log:
            return [(math.log10(value), f"{value:g}") for value in _round_numbers(self.low, self.high)]
        return [(x := self.low + (self.high - self.low) * i / 4, f"{x:.3g}") for i in range(5)]

    def ticks01(self) -> list[tuple[float, str]]:
        return [(self._share(x), text) for x, text in self.ticks()]

    def spread(self, records: Sequence[Record]) -> list[float]:
        """Heights from 0 to 1; those of one value lie a little apart, so that lines do not hide each other."""
        step = 0.06 / max(1, len(self.places) - 1) if self.places is not None else 0.0
        return [
            min(1.02, max(-0.02, self._share(self.at(r)) + step * shift))
            for r, shift in zip(records, _shifts(len(records)), strict=True)
        ]

    def jittered(self, records: Sequence[Record]) -> list[float]:
        width = 0.4 if self.places is not None else 0.0
        return [self.at(record) + width * shift for record, shift in zip(records, _shifts(len(records)), strict=True)]

    def _share(self, x: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        return (x - low) / (high - low) if high > low else 0.5


def axis_of(key: str, records: Sequence[Record]) -> Axis:
    values: list[Any] = [record.config.get(key) for record in records]
    numbers = all(map(is_number, values))
    distinct = sorted(
        {shown(value): value for value in values}.items(), key=lambda item: item[1] if numbers else item[0]
    )
    drawn = numbers and _FEW_DRAWN < len(distinct) == len(values)  # by a search: none comes twice
    if not drawn and (not numbers or len(distinct) <= FEW):
        return Axis(key, {text: place for place, (text, _) in enumerate(distinct)}, False, 0, len(distinct) - 1)
    low, high = float(distinct[0][1]), float(distinct[-1][1])
    return Axis(key, None, low > 0 and high / low > _DECADE, low, high)


def short(text: str) -> str:
    """A value as a label: a number to three digits, a long text without its middle."""
    with contextlib.suppress(ValueError):
        return text if len(text) <= _DIGITS else f"{float(text):.3g}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2 - 1]}…{text[-_LONGEST // 2 :]}"


def positions_of(records: Sequence[Record], axis: Axis) -> tuple[list[int], list[str]]:
    """The cell of each record, and what the cells are called: a value each, or intervals of about as many records."""
    if axis.places is not None:
        return [axis.places[shown(record.config.get(axis.key))] for record in records], [short(v) for v in axis.places]
    values: list[Any] = [record.config[axis.key] for record in records]
    ordered = sorted(values)
    edges = sorted({ordered[i * len(ordered) // _INTERVALS] for i in range(_INTERVALS)})
    cells = [sum(value >= edge for edge in edges) - 1 for value in values]
    ends = [*edges[1:], ordered[-1]]
    return cells, [f"{low:.2g} to {high:.2g}" for low, high in zip(edges, ends, strict=True)]


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two numbers, or only those where that is many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(found) <= _LABELS:
            break
    return found


def _shifts(count: int) -> list[float]:
    """Numbers from -0.5 to 0.5, evenly spread in any order (multiples of the golden ratio) and the same each time."""
    return [(i * 0.6180339887498949) % 1 - 0.5 for i in range(count)]
