"""The data of one run, as every later step reads it: Arrow files mapped into memory.

train-N.arrow     the rows of source N, in the order they were read
order.npy         which of them train, in their order over all sources; absent where all do, as they stand
eval.arrow        held-out rows, absent where there are none
facts.json        what became of every row that was read
tokenizer/        with its chat template; in a run directory alone
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from sft_lab.data.template import Template
from sft_lab.errors import ConfigError
from sft_lab.runs import RunDirectory, link_directory, read_json, whole_directory, write_json


@dataclass
class Prepared:
    """Tokens and labels of a run. `eval` also has prompt_ids and reference, for generation.

    Columns: input_ids, labels (both of `length` tokens), supervised (how many of them carry loss), place and number
    (where the row was read), part (0, or counted from 1 where a long row was split), turns, notes, digest.
    """

    train: Dataset
    eval: Dataset
    tokenizer: Any
    facts: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # of the cache entry
    order: np.ndarray | None = None  # in which rows of its files train

    def column(self, name: str) -> np.ndarray:
        """A number of each training row."""
        return self.in_order(self.train.data.column(name).to_numpy())

    def in_order(self, values: np.ndarray) -> np.ndarray:
        """Of a value for each row of the files, those of the rows that train."""
        return values if self.order is None else values[self.order]

    @property
    def template(self) -> Template:
        return Template.of(self.facts["template"])

    @functools.cached_property
    def questions(self) -> Dataset:
        return asking(self.eval)

    @property
    def turn_end_id(self) -> int:
        return self.template.turn_end.id

    def row_id(self, row: dict[str, Any]) -> str:
        """A row's name: FILE:NUMBER, with #PART where a long row was split."""
        return self.named(row["place"], row["number"]) + (f"#{row['part']}" if row["part"] else "")

    def named(self, place: int, number: int) -> str:
        return f"{self.facts['places'][place]}:{number}"

    def save(self, run: RunDirectory) -> None:
        """Put the data into the run directory: hard links where the file system has them, so that it costs no space."""
        with whole_directory(run.data, "facts.json") as folder:
            if self.folder is not None:
                link_directory(self.folder, folder)
            self.tokenizer.save_pretrained(str(folder / "tokenizer"))
            write_json(folder / "facts.json", self.facts)

    @classmethod
    def load(cls, run: RunDirectory, trust_remote_code: bool = False) -> Prepared:
        """What `save` put into a run directory.

        Raises:
            ConfigError: it is not there, or another version of this program put it there.
        """
        from transformers import AutoTokenizer

        for name in ("train-0.arrow", "facts.json", "tokenizer"):
            if not (run.data / name).exists():
                raise ConfigError(
                    f"{run.path}: its data/ has no {name}: the run ended before its data was written, or is of another "
                    "version of sft_lab, which can read it (allowed: a run of this version)"
                )
        tokenizer = AutoTokenizer.from_pretrained(str(run.data / "tokenizer"), trust_remote_code=trust_remote_code)
        return cls.of(run.data, tokenizer)

    @classmethod
    def of(cls, folder: Path, tokenizer: Any) -> Prepared:
        """What lies in a cache entry or in a run's data folder."""
        files = sorted(folder.glob("train-*.arrow"), key=lambda file: int(file.stem.removeprefix("train-")))
        parts = [Dataset.from_file(str(file)) for file in files]
        train = concatenate_datasets([part for part in parts if len(part)] or parts[:1])
        order = np.load(folder / "order.npy") if (folder / "order.npy").is_file() else None
        if order is not None:
            train = train.select(order)
            if (np.diff(order) == 1).all():  # `select` makes a slice of these, with no other row in it
                order = None
        held_out = folder / "eval.arrow"
        evaluation = Dataset.from_file(str(held_out)) if held_out.is_file() else Dataset.from_list([])
        return cls(train, evaluation, tokenizer, read_json(folder / "facts.json"), folder, order)


def asking(rows: Dataset) -> Dataset:
    """The held-out rows that ask something, each once: plain text and rows of tokens have a loss and no answer, and
    the parts of a row that was split have the one question of it all.
    """
    if not len(rows):
        return rows
    chosen = [
        i for i, (ids, part) in enumerate(zip(rows["prompt_ids"], rows["part"], strict=True)) if ids and part <= 1
    ]
    return rows if len(chosen) == len(rows) else rows.select(chosen)
