"""Packing: every row whole, none lost, little space wasted."""

from __future__ import annotations

import numpy as np
import pytest

from sft_lab.data.pack import WINDOW, plan

CAPACITY = 1024


def lengths_like_chats(count: int, seed: int = 0) -> list[int]:
    """As instruction data sets have them: most rows short, a few as long as may be."""
    drawn = np.random.default_rng(seed).lognormal(np.log(290), 0.8, count)
    return np.clip(drawn.round(), 1, CAPACITY).astype(int).tolist()


LENGTHS = {
    "like chats": lengths_like_chats(5000),
    "all long": [CAPACITY] * 20,
    "all one": [1] * 3000,
    "just over half": [CAPACITY // 2 + 1] * 20,
    "uniform": np.random.default_rng(1).integers(1, CAPACITY + 1, 3000).tolist(),
    "one row": [7],
    "none": [],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("window", [WINDOW, 64, 1])
def test_every_row_is_in_one_pack_and_none_is_too_full(lengths: list[int], window: int) -> None:
    packs = plan(lengths, CAPACITY, window)
    assert sorted(row for rows in packs for row in rows) == list(range(len(lengths)))
    assert all(0 < sum(lengths[row] for row in rows) <= CAPACITY for rows in packs)


def test_rows_like_chats_fill_their_packs() -> None:
    """One row in eleven takes less than a tenth of a pack and closes a gap; taken as they come, all fill 78 %."""
    lengths = LENGTHS["like chats"]
    assert sum(lengths) / (CAPACITY * len(plan(lengths, CAPACITY))) >= 0.97


def test_rows_that_fill_a_pack_exactly() -> None:
    assert sorted(map(sorted, plan([600, 1024, 424, 512, 512], CAPACITY))) == [[0, 2], [1], [3, 4]]


def test_a_row_goes_where_it_leaves_least_space() -> None:
    """600 and 700 stand alone; 320 fits with either and leaves 4 beside 700, so that 400 finds room beside 600."""
    assert sorted(map(sorted, plan([600, 700, 320, 400], CAPACITY))) == [[0, 3], [1, 2]]


def test_rows_share_a_pack_with_those_of_their_window() -> None:
    """In a data set that is ordered, a row's neighbours stay near it."""
    packs = plan(LENGTHS["like chats"], CAPACITY, 500)
    windows = [{row // 500 for row in rows} for rows in packs]
    assert all(len(window) == 1 for window in windows)
    numbers = [min(window) for window in windows]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(10))


def test_the_same_lengths_are_packed_the_same_way() -> None:
    lengths = LENGTHS["uniform"]
    assert plan(lengths, CAPACITY) == plan(list(lengths), CAPACITY)
    assert plan(lengths, CAPACITY) == plan(np.array(lengths), CAPACITY)  # type: ignore[arg-type]


def test_a_row_that_fits_in_no_pack_is_not_cut() -> None:
    with pytest.raises(AssertionError, match="row 1 of 1025 tokens in packs of 1024"):
        plan([3, CAPACITY + 1], CAPACITY)
