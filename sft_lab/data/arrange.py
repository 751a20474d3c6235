"""Which of the rows that were made into tokens train, and in what order: duplicates left out, sources mixed."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset, interleave_datasets

from sft_lab.data import duplicates
from sft_lab.data.convert import Account
from sft_lab.data.sources import Source
from sft_lab.errors import PreflightError
from sft_lab.schema import DataConfig


def arrange(
    data: DataConfig, training: list[Source], parts: list[Dataset], account: Account
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """The order in which rows train (None: all of them, as they stand), and the facts about them.

    Rows left out as duplicates are added to `account`.
    """
    columns = {name: np.concatenate([_column(part, name) for part in parts]) for name in _NUMBERS}
    first = np.flatnonzero(columns["part"] <= 1)  # parts of a row that was split count as one
    copies = _copies(parts, columns, first)
    repeated = np.zeros(len(first), dtype=bool)
    for kind in {"none": [], "exact": ["exact"], "near": ["exact", "near"]}[data.deduplicate]:
        repeated |= copies[kind] != np.arange(len(first))
    if repeated.any():
        account.dropped["duplicate"] = _names(columns, first[repeated])
    order, mixed = _mixed(data, training, parts, np.flatnonzero(~repeated[np.cumsum(columns["part"] <= 1) - 1]))
    facts = {
        "rows": {"read": account.read, "kept": len(order), "dropped": account.counted},
        "tokens": {name: int(columns[column][order].sum()) for name, column in _TOKENS.items()},
        "duplicates": {kind: _pairs(of, first, columns) for kind, of in copies.items()},
        "distinct_answers": len(np.unique(columns["answer"][first])),
        "mixed": mixed,
    }
    as_they_stand = len(order) == len(columns["part"]) and bool((order == np.arange(len(order))).all())
    return None if as_they_stand else order, facts


_NEAR = 0.8  # a usual Jaccard index for near duplicates; one word in 60 changed leaves 0.86
_NUMBERS = ("place", "number", "part", "length", "supervised", "digest", "answer")
_TOKENS = {"total": "length", "supervised": "supervised"}


def _column(dataset: Dataset, name: str) -> np.ndarray:
    return dataset.data.column(name).to_numpy() if len(dataset) else np.zeros(0, dtype=np.int64)


def _copies(parts: list[Dataset], columns: dict[str, np.ndarray], first: np.ndarray) -> dict[str, np.ndarray]:
    """Of each row the one that it repeats, or itself: exactly, and (where there are signatures) nearly."""
    copies = {"exact": duplicates.exact(columns["digest"][first])}
    if all("signature" in part.column_names for part in parts):
        near = itself = np.arange(len(first))
        if len(first):
            signatures = np.concatenate([_signatures(part) for part in parts if len(part)])
            near = duplicates.near(signatures[first], _NEAR)
        copies["near"] = np.where(copies["exact"] == itself, near, itself)
    return copies


def _signatures(dataset: Dataset) -> np.ndarray:
    """(rows, bytes) of the column, whose values all have the same number of bytes."""
    joined = b"".join(value.as_buffer().to_pybytes() for value in dataset.data.column("signature"))
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(dataset), -1)


def _names(columns: dict[str, np.ndarray], rows: np.ndarray) -> list[tuple[int, int]]:
    """Place and number of rows."""
    return [(int(columns["place"][row]), int(columns["number"][row])) for row in rows]


def _pairs(copies: np.ndarray, first: np.ndarray, columns: dict[str, np.ndarray]) -> list[Any]:
    """((place, number) of a row, (place, number) of the row that it repeats)."""
    repeats = np.flatnonzero(copies != np.arange(len(copies)))
    return list(zip(_names(columns, first[repeats]), _names(columns, first[copies[repeats]]), strict=True))


def _mixed(
    data: DataConfig, training: list[Source], parts: list[Dataset], kept: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """The kept rows of all sources, concatenated or interleaved by weight, and how many are of each.

    Raises:
        PreflightError: a source to be interleaved has none.
    """
    names = list(data.sources) if data.source == "mixture" else [data.source]
    ends = np.cumsum([len(part) for part in parts])
    owner = np.searchsorted(ends, kept, side="right")
    if data.mix == "concatenate" or not len(kept):
        order = kept
    else:
        pools = [Dataset.from_dict({"row": kept[owner == i]}) for i in range(len(parts))]
        empty = [name for name, pool in zip(names, pools, strict=True) if not len(pool)]
        if empty:
            hint = "(allowed: data.mix=concatenate, or leave the source out)"
            raise PreflightError([f"data.sources.{name} : no row of it is left to draw {hint}" for name in empty])
        weights = np.array([source.config.weight for source in training], dtype=float)
        order = np.array(
            interleave_datasets(
                pools,
                probabilities=list(weights / weights.sum()),
                seed=data.seed,
                stopping_strategy="first_exhausted" if data.mix == "interleave_first_exhausted" else "all_exhausted",
            )["row"],
            dtype=np.int64,
        )
        order = order[: data.train_rows] if data.train_rows >= 0 else order
    drawn = np.bincount(np.searchsorted(ends, order, side="right"), minlength=len(parts))
    return order, dict(zip(names, map(int, drawn), strict=True))
