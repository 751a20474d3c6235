"""The data of one run, made in one process before any rank: read, template, tokenize, mask, cut or drop, pack."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, load_from_disk

from sft_lab import model as models
from sft_lab.data import formats, sources, template, tokenize
from sft_lab.data.formats import RowError
from sft_lab.data.sources import RawRow
from sft_lab.errors import PreflightError
from sft_lab.runs import RunDirectory, read_json, whole_directory, write_json
from sft_lab.schema import Config

_SHOWN = 20  # problems listed in an error; the rest is counted


@dataclass
class Prepared:
    """Tokens and labels of a run. `eval` also has prompt_ids and reference, for generation.

    train: input_ids, labels; when packed also seq_lengths, the tokens of each document of the row.
    """

    train: Dataset
    eval: Dataset
    tokenizer: Any
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def turn_end_id(self) -> int:
        return int(self.facts["turn_end_id"])

    def save(self, run: RunDirectory) -> None:
        with whole_directory(run.data) as folder:
            self.train.save_to_disk(str(folder / "train"))
            if len(self.eval):  # an empty one cannot be read back
                self.eval.save_to_disk(str(folder / "eval"))
            self.tokenizer.save_pretrained(str(folder / "tokenizer"))
            write_json(folder / "facts.json", self.facts)

    @classmethod
    def load(cls, run: RunDirectory, trust_remote_code: bool = False) -> Prepared:
        from transformers import AutoTokenizer

        return cls(
            train=load_from_disk(str(run.data / "train")),
            eval=load_from_disk(str(run.data / "eval")) if (run.data / "eval").is_dir() else Dataset.from_list([]),
            tokenizer=AutoTokenizer.from_pretrained(str(run.data / "tokenizer"), trust_remote_code=trust_remote_code),
            facts=read_json(run.data / "facts.json"),
        )


def prepare(config: Config) -> Prepared:
    """Everything that a run trains and is evaluated on.

    Raises:
        PreflightError: rows that cannot be trained on (each with file, row and reason), or none left.
        RunError: the model's tokenizer or a hub data set cannot be had.
    """
    train_rows, eval_rows = sources.read(config.data, config.seed)
    tokenizer = models.load_tokenizer(config.model)
    used, turn_end = template.apply(tokenizer, config.chat_template.name)
    fingerprint = sources.fingerprint(config.data, [*train_rows, *eval_rows])
    train_rows, eval_rows = _split(config, train_rows, eval_rows)
    rows, others = _Rows(config, tokenizer, turn_end), _Rows(config, tokenizer, turn_end)
    train, held_out = rows.convert(train_rows), others.convert(eval_rows, with_prompt=True)
    _raise_problems(rows.problems + others.problems)
    if not train:
        raise PreflightError(f"data.path={config.data.path}: no row is left to train on ({dict(rows.dropped)})")
    facts = {
        "chat_template": used,
        "turn_end": turn_end.token,
        "turn_end_id": turn_end.id,
        "pad": tokenizer.pad_token,
        "data_fingerprint": fingerprint,
        "rows": {
            "read": len(train_rows),
            "kept": len(train),
            "dropped": {reason: len(ids) for reason, ids in rows.dropped.items()},
        },
        "dropped_rows": dict(rows.dropped),
        "dropped_eval_rows": dict(others.dropped),
        "truncated_rows": rows.truncated,
        "tokens": {
            "total": sum(len(row["input_ids"]) for row in train),
            "supervised": sum(label != tokenize.IGNORE for row in train for label in row["labels"]),
        },
    }
    return Prepared(_dataset(config, train), Dataset.from_list(held_out), tokenizer, facts)


def evaluation_rows(config: Config, tokenizer: Any, turn_end: template.TurnEnd) -> Dataset:
    """The held-out rows that `config.data` names, or all its rows where it holds none out, with prompt and reference.

    Raises:
        PreflightError: rows that cannot be used, each with file, row and reason, or none left.
    """
    train_rows, eval_rows = _split(config, *sources.read(config.data, config.seed))
    rows = _Rows(config, tokenizer, turn_end)
    converted = rows.convert(eval_rows or train_rows, with_prompt=True)
    _raise_problems(rows.problems)
    if not converted:
        raise PreflightError(f"data.path={config.data.path}: no row is left to evaluate on ({dict(rows.dropped)})")
    return Dataset.from_list(converted)


def _split(config: Config, train: list[RawRow], held_out: list[RawRow]) -> tuple[list[RawRow], list[RawRow]]:
    data = config.data
    if data.source != "requests" and data.eval_rows > 0:
        if data.eval_rows >= len(train):
            raise PreflightError(
                f"data.eval_rows={data.eval_rows} : {data.path} has {len(train)} rows, none would be left to train on "
                f"(allowed: 0 to {len(train) - 1})"
            )
        order = list(range(len(train)))
        random.Random(config.seed).shuffle(order)
        cut = len(train) - data.eval_rows
        train, held_out = [train[i] for i in sorted(order[:cut])], [train[i] for i in sorted(order[cut:])]
    if data.train_rows >= 0:
        train = train[: data.train_rows]
    return train, held_out


def _dataset(config: Config, rows: list[dict[str, Any]]) -> Dataset:
    dataset = Dataset.from_list(rows)
    if not config.trainer.packing:
        return dataset
    from trl import pack_dataset

    return pack_dataset(dataset.select_columns(["input_ids", "labels"]), config.trainer.max_length, "bfd")


def _raise_problems(problems: list[str]) -> None:
    if not problems:
        return
    more = len(problems) - _SHOWN
    raise PreflightError(problems[:_SHOWN] + ([f"and {more} more rows"] if more > 0 else []))


class _Rows:
    """Turns raw rows into tokens and keeps account of those it cannot."""

    def __init__(self, config: Config, tokenizer: Any, turn_end: template.TurnEnd):
        self.data, self.max_length = config.data, config.trainer.max_length
        self.tokenizer, self.turn_end = tokenizer, turn_end
        self.problems: list[str] = []
        self.dropped: dict[str, list[str]] = {}
        self.truncated: list[str] = []

    def convert(self, rows: list[RawRow], with_prompt: bool = False) -> list[dict[str, Any]]:
        converted = (self._convert(row, with_prompt) for row in rows)
        return [row for row in converted if row is not None]

    def _convert(self, row: RawRow, with_prompt: bool) -> dict[str, Any] | None:
        try:
            if row.problem:
                raise RowError(row.problem)
            messages = formats.to_messages(row.value, self.data.format)
            tokens = tokenize.tokenize(self.tokenizer, messages, self.turn_end)
            prompt = tokenize.prompt_and_reference(self.tokenizer, messages) if with_prompt else None
        except RowError as error:
            self._bad(row, str(error))
            return None
        if len(tokens["input_ids"]) > self.max_length and not self._shortened(row, tokens):
            return None
        result: dict[str, Any] = {"id": row.id, **tokens}
        if prompt:
            result["prompt_ids"], result["reference"] = prompt
        return result

    def _bad(self, row: RawRow, reason: str) -> None:
        if self.data.on_bad_row == "skip":
            self.dropped.setdefault("bad", []).append(f"{row.id}: {reason}")
        else:
            hint = "" if self.problems else " (data.on_bad_row=skip leaves such rows out and records which)"
            self.problems.append(f"{row.source}: row {row.number}: {reason}{hint}")

    def _shortened(self, row: RawRow, tokens: dict[str, list[int]]) -> bool:
        """Cut a row to max_length in place where the config allows it and some of its response is left."""
        length = len(tokens["input_ids"])
        if self.data.on_long_row == "error":
            self.problems.append(
                f"{row.source}: row {row.number}: {length} tokens, more than trainer.max_length={self.max_length}"
            )
            return False
        if self.data.on_long_row == "truncate":
            for values in tokens.values():
                del values[self.max_length :]
            if any(label != tokenize.IGNORE for label in tokens["labels"]):
                self.truncated.append(row.id)
                return True
        self.dropped.setdefault("long", []).append(row.id)
        return False
