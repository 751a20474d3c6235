"""Which rows share a packed row: best-fit decreasing, which wastes least of the space at the end of each.

A packed row is a list of whole documents; none is cut. Source: Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", arXiv:2404.10830.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

WINDOW = 10_000  # rows considered together, so that a row's neighbours stay near it in a data set that is ordered


def plan(lengths: Sequence[int], capacity: int, window: int = WINDOW) -> list[list[int]]:
    """Indices of the rows that make up each packed row of at most `capacity` tokens.

    Args:
        lengths: tokens of each row, none more than `capacity`.
    """
    packs: list[list[int]] = []
    for start in range(0, len(lengths), window):
        packs += _best_fit_decreasing(lengths, range(start, min(start + window, len(lengths))), capacity)
    return packs


def _best_fit_decreasing(lengths: Sequence[int], rows: range, capacity: int) -> list[list[int]]:
    """Each row, the longest first, goes where it leaves the least space."""
    packs: list[list[int]] = []
    open_: list[tuple[int, int]] = []  # (space left, number of the pack), sorted
    for row in sorted(rows, key=lambda i: -lengths[i]):
        length = lengths[row]
        assert length <= capacity, f"row {row} of {length} tokens in packs of {capacity}"
        place = bisect_left(open_, (length, -1))
        if place < len(open_):
            space, number = open_.pop(place)
            packs[number].append(row)
        else:
            space, number = capacity, len(packs)
            packs.append([row])
        if space > length:
            insort(open_, (space - length, number))
    return packs
