"""Which rows of which sources train, and which are held out."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sft_lab.data import cache, sources
from sft_lab.data.sources import Place, RawRow, Source
from sft_lab.errors import PreflightError
from sft_lab.schema import DataConfig

_STREAM_SAMPLE = 1000  # rows of a stream that are looked at before training


@dataclass
class Selection:
    """The sources that a config names, and their rows as it divides them.

    Attributes:
        held_out: a source that is of held-out rows alone; None where there is none.
    """

    data: DataConfig
    training: list[Source]
    held_out: Source | None

    @classmethod
    def of(cls, data: DataConfig) -> Selection:
        training = sources.training(data)
        return cls(data, training, sources.held_out(data, sum(len(source.places) for source in training)))

    @property
    def every_source(self) -> list[Source]:
        return [*self.training, self.held_out] if self.held_out else self.training

    @property
    def places(self) -> list[Place]:
        return [place for source in self.every_source for place in source.places]

    def named(self, place: int, number: int) -> str:
        return f"{self.places[place].name}:{number}"

    @property
    def fingerprint(self) -> str:
        """A digest of the contents of all of them."""
        return cache.digest_of(*(place.fingerprint for place in self.places))

    def require_unchanged(self) -> None:
        """
        Raises:
            PreflightError: a file is not what it was when its fingerprint was taken.
        """
        for place in self.places:
            place.require_unchanged()

    @property
    def draws(self) -> bool:
        """Whether chance, and with it a seed, has a say in which rows train, or in their order."""
        sampled = any(source.config.sample < 1 for source in self.training)
        return sampled or self.data.mix != "concatenate" or self._holds_out

    @property
    def _holds_out(self) -> bool:
        return self.data.source != "requests" and (self.data.eval_rows > 0 or self.data.eval_fraction > 0)

    @functools.cached_property
    def held_out_masks(self) -> list[np.ndarray] | None:
        """Of each training source which rows are held out; None where the config holds none out of them.

        Raises:
            PreflightError: none would be left to train on.
        """
        data = self.data
        if not self._holds_out:
            return None
        counts = [source.count() for source in self.training]
        total = sum(counts)
        count = data.eval_rows if data.eval_rows > 0 else round(data.eval_fraction * total)
        if count >= total:
            given = f"eval_rows={count}" if data.eval_rows > 0 else f"eval_fraction={data.eval_fraction:g}"
            raise PreflightError(
                f"data.{given} : {data.path or data.source} has {total} rows, none would be left to train on "
                f"(allowed: 0 to {total - 1 if data.eval_rows > 0 else 'less than 1'})"
            )
        mask = np.zeros(total, dtype=bool)
        mask[np.random.default_rng(data.seed).permutation(total)[:count]] = True
        return np.split(mask, np.cumsum(counts)[:-1])

    def training_rows(self) -> Iterator[tuple[Source, Iterator[RawRow]]]:
        """Each source with its rows, held-out ones left out, no more than data.train_rows over all of them."""
        data = self.data
        left = data.train_rows if data.train_rows >= 0 and data.mix == "concatenate" else None
        left = _STREAM_SAMPLE if data.streaming else left
        budget = iter(range(left)) if left is not None else itertools.count()
        masks = self.held_out_masks or itertools.repeat(None, len(self.training))
        for source, mask in zip(self.training, masks, strict=True):
            rows = iter(source) if mask is None else itertools.compress(source, ~mask)
            yield source, (row for row, _ in zip(rows, budget, strict=False))

    def held_out_rows(self, or_all: bool) -> Iterator[tuple[Source, Iterable[RawRow]]]:
        if self.held_out is not None:
            yield self.held_out, self.held_out
        elif self.held_out_masks is not None:
            for source, mask in zip(self.training, self.held_out_masks, strict=True):
                yield source, itertools.compress(source, mask)
        elif or_all:
            yield from ((source, source) for source in self.training)
