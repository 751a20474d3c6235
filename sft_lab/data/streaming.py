"""Rows that are made into tokens as training goes, for data larger than the disk.

What needs all rows at once (held-out rows out of them, duplicates, batches of like length) is refused by the config's
checks; a bad row, and one that gives away a held-out row, is found when its turn comes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
from datasets import IterableDataset

from sft_lab.data import duplicates, pack, sources
from sft_lab.data.batches import join, strategy
from sft_lab.data.convert import Account, Converter
from sft_lab.data.prepared import Prepared
from sft_lab.data.sources import Source
from sft_lab.errors import RunError
from sft_lab.schema import Config

log = logging.getLogger("sft_lab")

_WINDOW = 1000  # rows that are read, converted and packed together
_NAMED = 5  # rows left out of a window that the log names
T = TypeVar("T")


def training_rows(config: Config, data: Prepared) -> IterableDataset:
    """Rows, or packed rows, one pass over the data after another without an end.

    To the Trainer they are a single epoch: it can't tell how many passes a checkpoint's steps took, so that a resumed
    run, which reads from the start and passes over what was trained, would go on in the wrong place of the wrong pass.
    """
    return IterableDataset.from_generator(
        _endless, gen_kwargs={"config": config, "converter": _converter(config, data)}
    )


def one_pass(config: Config, data: Prepared, number: int) -> Iterator[dict[str, Any]]:
    """The rows of a pass, counted from 0, in the order that the seed and its number decide.

    The order is our own, and not that of `IterableDataset.shuffle`, which in a worker of a DataLoader is another one.
    """
    return _one_pass(config, _converter(config, data), number)


def _converter(config: Config, data: Prepared) -> Converter:
    return Converter(
        config.data,
        config.trainer.max_length,
        data.tokenizer,
        data.template,
        config.data.format,
        config.data.columns,
        frozenset(config.data.ignore_columns),
        leaks=duplicates.Leaks(data.eval["text"][:]) if len(data.eval) else None,
    )


def _endless(config: Config, converter: Converter) -> Iterator[dict[str, Any]]:
    known = _fingerprints(sources.training(config.data)[0])
    for number in itertools.count():
        empty = True
        for row in _one_pass(config, converter, number, known):
            empty = False
            yield row
        if empty:
            raise RunError(f"data.path={config.data.path}: no row of it is left to train on")


def _one_pass(config: Config, converter: Converter, number: int, known: str = "") -> Iterator[dict[str, Any]]:
    rows = _rows(config, converter, known, tell=number == 0)
    if strategy(config) == "sequential":
        return rows
    return _shuffled(rows, config.data.shuffle_buffer, np.random.default_rng([config.seed, number]))


def _shuffled(rows: Iterator[T], size: int, random: np.random.Generator) -> Iterator[T]:
    """Each row, drawn out of a buffer that the next one then fills."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        place = int(random.integers(size))
        yield buffer[place]
        buffer[place] = row
    for place in random.permutation(len(buffer)):
        yield buffer[place]


def _fingerprints(source: Source) -> str:
    return " ".join(place.fingerprint for place in source.places)


def _rows(config: Config, converter: Converter, known: str, tell: bool = False) -> Iterator[dict[str, Any]]:
    """Rows in the order of the files.

    Args:
        known: the fingerprints of its places in the pass before; empty in the first one.
        tell: log those that are left out, which are the same in each pass.

    Raises:
        RunError: the fingerprints are others now.
    """
    (source,) = sources.training(config.data)
    if known and _fingerprints(source) != known:
        raise RunError(f"data.path={config.data.path}: changed while the run reads it")
    names = [place.name for place in source.places]
    raw = iter(source)
    while window := list(itertools.islice(raw, _WINDOW)):
        converted, account = converter.convert(window)
        bad = [f"{names[place]}: row {n}: {reason}" for place, n, reason in [*account.too_long, *account.bad]]
        if account.too_long or (bad and config.data.on_bad_row == "error"):
            hint = "" if account.too_long else " (data.on_bad_row=skip leaves such rows out)"
            raise RunError(f"{bad[0]}{hint}")
        if account.leaks and config.data.on_leak == "error" and "leak" not in config.preflight.allow:
            place, number, *_ = account.leaks[0]
            raise RunError(
                f"{names[place]}: row {number}: gives away a held-out row (data.on_leak=drop leaves such rows out, "
                "preflight.allow=[leak] lets them through)"
            )
        if tell:
            _log_left_out(account, names, bad)
        yield from _packed(converted, config) if config.trainer.packing else converted
    for read in source.places:
        read.require_unchanged()


def _log_left_out(account: Account, names: list[str], bad: list[str]) -> None:
    """A line for each reason, with the first rows by name."""
    for told in bad[:_NAMED]:
        log.warning("left out %s", told)
    if len(bad) > _NAMED:
        log.warning("left out %d more bad rows", len(bad) - _NAMED)
    for reason, rows in account.dropped.items():
        if reason != "bad":
            shown = ", ".join(f"{names[place]}:{number}" for place, number in rows[:_NAMED])
            more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
            log.info("left out (%s) %s%s", reason, shown, more)


def _packed(rows: list[dict[str, Any]], config: Config) -> Iterator[dict[str, Any]]:
    for documents in pack.plan([row["length"] for row in rows], config.trainer.max_length):
        yield join({name: [rows[i][name] for i in documents] for name in ("input_ids", "labels")})
