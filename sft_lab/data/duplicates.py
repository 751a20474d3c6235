"""Rows that stand twice among the training rows, and held-out rows that stand among them at all.

In two steps, so that rows can stream by in any number of processes: `digest` and `signature` make a few bytes of one
row's text, and `exact` and `near` compare all of those. `Leaks` indexes the held-out rows, which are few, and looks at
one training row at a time.

Texts are compared by their word 5-grams (shingles). Those see no difference between a row's own words and what every
row carries: rows whose system prompt is most of their text are near duplicates to `signature`, so leave it out of the
text. Every hash here is a fixed function of the text: the same rows give the same result in any process.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
import zlib
from collections.abc import Iterable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SHINGLE = 5  # words; fewer make unrelated texts alike by common phrases, more miss a text in which words were changed
SLOTS = 256  # of a signature, a byte each: the estimate of a Jaccard index of 0.85 has a standard deviation of 0.022
_BLOCK = 1024  # shingles or rows compared at once, which bounds the memory of a long row or a large cluster
_MISSED = 0.001  # of the pairs just at the threshold, those that never become candidates
_MOST_SWEEPS = 100  # per bucket: rows of one long template that are no duplicates would take quadratic time

_LEAK_SHARE = 0.8  # of a held-out row's shingles
_LEAK_SHINGLES = 8  # fewer stand in other rows by chance; such rows leak only when they are the same

_QUOTES_AND_DASHES = [(re.compile("[‘’‚‛ʼ´′]"), "'"), (re.compile("[“”„‟″]"), '"'), (re.compile("[‐‑‒–—―−﹘]"), "-")]
# Scripts that put no space between words, so each character counts as one: Thai and Lao, Tibetan, Burmese, Khmer,
# kana, Han.
_SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def _constants(purpose: str, count: int) -> NDArray[np.uint64]:
    """Odd numbers that look random, the same everywhere; being odd, a product with one loses nothing modulo 2**64."""
    return np.frombuffer(hashlib.shake_128(purpose.encode()).digest(8 * count), "<u8").astype(np.uint64) | np.uint64(1)


_WEIGHTS = _constants("shingle", SHINGLE)
_COLUMNS = _constants("column", SLOTS)
_FACTORS = _constants("factor", SLOTS).astype(np.uint32)
_OFFSETS = (_constants("offset", SLOTS) >> 32).astype(np.uint32)


# ------------------------------------------------------------------------------------------------------------- a row


def normalise(text: str) -> str:
    """The text without what only its way here changed: case, white space, widths and ligatures, curly quotes, dashes.

    Punctuation stays, since `x < 3` and `x > 3`, or 5 and -5, are different rows.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    for pattern, plain in _QUOTES_AND_DASHES:  # before NFKC, which makes a space and an accent of some
        text = pattern.sub(plain, text)
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", text).split())


def digest(text: str) -> int:
    """64 bits of the normalised text, signed as in Arrow: two rows of a million share them once in 4e7 data sets."""
    return _digest(normalise(text))


def _digest(normalised: str) -> int:
    return int.from_bytes(hashlib.blake2b(_encoded(normalised), digest_size=8).digest(), "little", signed=True)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # JSON can hold half a surrogate pair


def signature(text: str) -> bytes:
    """A MinHash of the row's shingles, SLOTS bytes: the share of equal ones in two rows estimates the Jaccard index.

    A row of fewer words than a shingle is like those only that are the same. A slot is the least value of a
    permutation `factor * x + offset` modulo 2**32 over the shingles, of which 8 bits are kept: twice as exact as half
    the slots at 16 bits (Li and König, "b-Bit Minwise Hashing", 2010).
    """
    # "full": a word at either end stands in as many shingles as the others, since it may be all of the answer.
    shingles = (_shingles(normalise(text), "full") >> 32).astype(np.uint32)
    least = np.full(SLOTS, np.iinfo(np.uint32).max)
    for start in range(0, len(shingles), _BLOCK):
        np.minimum(least, (shingles[start : start + _BLOCK, None] * _FACTORS + _OFFSETS).min(axis=0), out=least)
    mixed = least * np.uint32(0x9E3779B1)  # the least of many has zeros at its top
    return (mixed >> 24).astype(np.uint8).tobytes()


def _shingles(normalised: str, ends: Literal["full", "valid"]) -> NDArray[np.uint64]:
    """A hash of each SHINGLE words in a row, in order; one of the whole text where there are fewer.

    Args:
        ends: "full" has also the shingles that reach over an end of the text, "valid" has not.
    """
    spaced = normalised if normalised.isascii() else _SPACELESS.sub(r" \g<0> ", normalised)
    words = _encoded(spaced).split()
    if len(words) < SHINGLE:
        return np.array([_digest(normalised)]).view(np.uint64)
    # CRC-32 is fast and takes two words for one in 4e9 times; a weighted sum of them mixes a shingle (multilinear
    # hashing). np.convolve is that sum at every place, modulo 2**64.
    return np.convolve(np.fromiter(map(zlib.crc32, words), np.uint64, len(words)), _WEIGHTS, ends)


# ------------------------------------------------------------------------------------------------------- all the rows


def exact(digests: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each row the index of the first with its digest: its own if it is the first."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def near(signatures: NDArray[np.uint8], threshold: float = 0.85) -> NDArray[np.int64]:
    """For each row the index of the row that stays for it: its own if it stays itself.

    In the order of the rows, one stays unless its Jaccard index with an earlier row that stays is the threshold or
    more, by their signatures. So every row that goes is like the one that stays for it, and no chain of small steps
    takes away a row that is like none left. Rows of the same normalised text always go together. Takes 200 to 600
    bytes a row besides the signatures, more below a threshold of 0.8.

    Args:
        signatures: (rows, SLOTS), as `np.frombuffer(b"".join(...), np.uint8).reshape(-1, SLOTS)` makes them.
        threshold: above 0, at most 1. One word changed in n leaves an index of (n - 1) / (n + 9).
    """
    first = exact(_row_hashes(np.ascontiguousarray(signatures).view(np.uint64)).view(np.int64))
    equal = math.ceil(SLOTS * (threshold + (1 - threshold) / 256) - 1e-9)  # of unlike slots 1 in 256 is equal
    distinct, width = np.flatnonzero(first == np.arange(len(first))), _band_width(threshold)
    bands = [_Band(signatures, distinct, at, width) for at in range(0, SLOTS - width + 1, width)]
    for row in np.flatnonzero(np.any([band.bucket >= 0 for band in bands], axis=0)):
        if first[row] != row:
            continue
        others = np.concatenate([band.alike(row) for band in bands])
        others = np.unique(others[(others > row) & (first[others] == others)])
        for block in np.split(others, range(_BLOCK, len(others), _BLOCK)):
            same = np.count_nonzero(signatures[block] == signatures[row], axis=1)
            first[block[same >= equal]] = row
    return first[first]  # a row of the same signature as an earlier one goes where that one went


def _row_hashes(rows: NDArray[np.uint8] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(rows, n) to (rows,): a hash of each row of numbers."""
    return rows.astype(np.uint64, copy=False) @ _COLUMNS[: rows.shape[1]]


def _band_width(threshold: float) -> int:
    """The most slots in a band such that two rows at the threshold agree in all of some band, but for _MISSED."""
    widths = (w for w in range(SLOTS, 1, -1) if (1 - threshold**w) ** (SLOTS // w) <= _MISSED)
    return next(widths, 1)


class _Band:
    """A few slots, and the buckets of rows that agree in all of them, which makes those worth comparing (LSH).

    `bucket` has a number for each row, -1 where no other row agrees with it.
    """

    def __init__(self, signatures: NDArray[np.uint8], rows: NDArray[np.int64], at: int, width: int):
        keys = _row_hashes(signatures[rows, at : at + width])
        _, sizes = np.unique(keys, return_counts=True)
        self._members = rows[np.argsort(keys)[np.repeat(sizes > 1, sizes)]].astype(np.int32)  # bucket by bucket
        sizes = sizes[sizes > 1]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._sweeps = np.zeros(len(sizes), np.int32)
        self.bucket = np.full(len(signatures), -1, np.int32)
        self.bucket[self._members] = np.repeat(np.arange(len(sizes)), sizes)

    def alike(self, row: np.int64) -> NDArray[np.int32]:
        """The rows of its bucket; none where there is no other, or once the bucket was asked for too often."""
        bucket = self.bucket[row]
        if bucket < 0 or self._sweeps[bucket] == _MOST_SWEEPS:
            return self._members[:0]
        self._sweeps[bucket] += 1
        return self._members[self._starts[bucket] : self._starts[bucket + 1]]


# -------------------------------------------------------------------------------------------------------------- leaks


class Leaks:
    """The held-out rows, to ask of each training row which of them it gives away.

    Shingles that many held-out rows share (a system prompt, the beginning of every answer) do not count: those in
    more than 5 rows and 2 %, or in more than half of fewer than ten. A single held-out row has no others to tell,
    so all of it counts. Rows of the same normalised text are one row here. Memory: about 20 bytes a word.
    """

    def __init__(self, held_out: Iterable[str]):
        rows: dict[int, list[int]] = {}
        sets = [np.empty(0, np.uint64)]
        for number, text in enumerate(held_out):
            normalised = normalise(text)
            same = rows.setdefault(_digest(normalised), [])
            if not same:
                sets.append(np.unique(_shingles(normalised, "valid")))
            same.append(number)
        self._by_digest, self._rows = rows, list(rows.values())
        self._index(np.repeat(np.arange(-1, len(rows)), list(map(len, sets))), np.concatenate(sets))

    def _index(self, owners: NDArray[np.int64], shingles: NDArray[np.uint64]) -> None:
        """Keep the shingles that count, sorted; the i-th is in the texts `_owners[_starts[i] : _starts[i + 1]]`."""
        texts = len(self._rows)
        most = max(1, min(5, texts // 2), int(0.02 * texts))
        _, inverse, having = np.unique(shingles, return_inverse=True, return_counts=True)
        counts = having[inverse] <= most
        left = np.bincount(owners[counts], minlength=texts)
        counts &= left[owners] >= _LEAK_SHINGLES
        order = np.argsort(shingles[counts])
        self._owners = owners[counts][order].astype(np.int32)
        self._shingles, starts = np.unique(shingles[counts][order], return_index=True)
        self._starts = np.append(starts, len(order))
        self._needed = np.ceil(_LEAK_SHARE * left)

    def find(self, text: str) -> list[tuple[int, str]]:
        """The held-out rows that stand in a training row, ascending, each with how.

        "exact": the same once normalised. "near": four in five of the held-out row's shingles that count stand
        anywhere in the training row, if at least 8 count.
        """
        normalised = normalise(text)
        how = dict.fromkeys(self._near(_shingles(normalised, "valid")), "near")
        how.update(dict.fromkeys(self._by_digest.get(_digest(normalised), ()), "exact"))
        return sorted(how.items())

    def _near(self, shingles: NDArray[np.uint64]) -> list[int]:
        if not len(self._shingles):
            return []
        places = np.searchsorted(self._shingles, shingles)
        hits = places[self._shingles.take(places, mode="clip") == shingles]
        if len(hits) < _LEAK_SHARE * _LEAK_SHINGLES:
            return []
        owners = [self._owners[self._starts[i] : self._starts[i + 1]] for i in np.unique(hits)]
        texts, found = np.unique(np.concatenate(owners), return_counts=True)
        return [row for text in texts[found >= self._needed[texts]] for row in self._rows[text]]
