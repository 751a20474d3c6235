"""In which order rows train, and which of them share a batch.

The order of an epoch follows from the seed and the epoch's number alone, so that a resumed run goes on with the same
batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from sft_lab.data import pack
from sft_lab.data.tokenize import IGNORE
from sft_lab.schema import Config

_MEGA_BATCH = 50  # micro-batches sorted by length together: enough to be alike, few enough to stay random


class TrainingRows:
    """What the trainer draws from: rows, or packed rows, in the order of the epoch.

    An item has input_ids and labels, lists of the same length; a packed one also seq_lengths, the tokens of each of its
    documents. It is a map-style data set for torch's DataLoader with a sequential sampler, which `set_epoch` reorders.

    Accelerate deals micro-batches out to the ranks in turn, and would give the first rows a second time to ranks that
    an epoch's end leaves without. A blank row has a token and no loss, so that an epoch of several ranks trains exactly
    the rows, in the steps, of an epoch of one.
    """

    def __init__(self, tokens: Dataset, lengths: np.ndarray, config: Config, pad_token_id: int = 0):
        self._tokens, self._config = tokens.select_columns(["input_ids", "labels"]), config
        self._pad = pad_token_id
        packed = config.trainer.packing
        self.packs = pack.plan(lengths.tolist(), config.trainer.max_length) if packed else None
        self.lengths = np.array([lengths[p].sum() for p in self.packs]) if self.packs is not None else lengths
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        t = self._config.trainer
        self.order = order(
            self.lengths, strategy(self._config), t.per_device_train_batch_size, self._config.seed, epoch
        )

    def __len__(self) -> int:
        """With several ranks a multiple of what they take at once: what the rows leave empty, blank ones fill."""
        replicas = self._config.distributed.replicas
        if replicas == 1:
            return len(self.lengths)
        at_once = self._config.trainer.per_device_train_batch_size * replicas
        return -(-len(self.lengths) // at_once) * at_once

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        if index >= len(self.order):
            return {"input_ids": [self._pad], "labels": [IGNORE], **({"seq_lengths": [1]} if self.packs else {})}
        row = int(self.order[index])
        if self.packs is None:
            return self._tokens[row]
        return join(self._tokens[self.packs[row]])

    def micro_batches(self) -> Iterator[np.ndarray]:
        """Rows of each batch of one process, as indices into `lengths` and `packs`."""
        size = self._config.trainer.per_device_train_batch_size
        return (self.order[start : start + size] for start in range(0, len(self.order), size))


def join(documents: dict[str, list[list[int]]]) -> dict[str, Any]:
    """One packed row of several documents."""
    return {
        "input_ids": [token for ids in documents["input_ids"] for token in ids],
        "labels": [label for labels in documents["labels"] for label in labels],
        "seq_lengths": [len(ids) for ids in documents["input_ids"]],
    }


def strategy(config: Config) -> str:
    """What trainer.train_sampling_strategy=auto comes to."""
    asked = config.trainer.train_sampling_strategy
    if asked != "auto":
        return asked
    return "random" if config.trainer.packing else "group_by_length"


def order(lengths: Sequence[int] | np.ndarray, strategy: str, size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the rows, `size` consecutive ones making a batch.

    group_by_length sorts random mega-batches and then shuffles their batches, so that a batch is alike in length while
    a step of several is not; what does not fill a batch comes last.
    """
    count = len(lengths)
    if strategy == "sequential":
        return np.arange(count)
    draw = np.random.default_rng([seed, epoch])
    shuffled = draw.permutation(count)
    if strategy == "random":
        return shuffled
    whole = count - count % size
    batches: list[np.ndarray] = []
    for start in range(0, whole, size * _MEGA_BATCH):
        mega = shuffled[start : min(start + size * _MEGA_BATCH, whole)]
        by_length = mega[np.argsort(np.asarray(lengths)[mega], kind="stable")]
        batches += list(draw.permutation(by_length.reshape(-1, size)))
    return np.concatenate([*batches, shuffled[whole:]]) if batches else shuffled
