"""The data of one run, made in one process before any rank: read, template, tokenize, mask, cut or drop, mix.

What comes out is a cache entry, whose files `prepared` names.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from sft_lab import model as models
from sft_lab.data import cache, convert, duplicates, formats, sources, template
from sft_lab.data.arrange import arrange
from sft_lab.data.convert import Account, Converter
from sft_lab.data.formats import RowError
from sft_lab.data.prepared import Prepared
from sft_lab.data.sources import RawRow, Source
from sft_lab.data.template import Template
from sft_lab.errors import ConfigError, PreflightError
from sft_lab.runs import write_json
from sft_lab.schema import Config, DataConfig

_SHOWN = 20  # problems listed in an error; the rest is counted
_COMPARED_BYTES = 16 << 20  # up to here near duplicates are looked for unasked; it takes 0.2 ms a row
_STREAM_SAMPLE = 1000  # rows of a stream that are looked at before training
_HOPELESS_ROWS = 20_000  # where a row is bad, reading goes on up to here to list the others, and no further


def prepare(config: Config) -> Prepared:
    """Everything that a run trains and is evaluated on.

    Raises:
        PreflightError: rows that cannot be trained on (each with file, row and reason), or none left.
        RunError: the model's tokenizer or a hub data set cannot be had.
    """
    tokenizer = models.load_tokenizer(config.model)
    used = template.apply(tokenizer, config.chat_template.name, config.chat_template.path)
    work = _Work.of(config, tokenizer, used)
    _check_columns(work.training)
    entry, message = cache.get(work.key(), work.build)
    prepared = Prepared.of(entry, tokenizer)
    prepared.facts["cache"] = message
    return prepared


def fingerprint(data: DataConfig) -> str:
    """A digest of the contents of everything that the config names, held-out rows too; nothing is made into tokens.

    Raises:
        PreflightError: a file is missing or of no known kind.
        RunError: the hub cannot be reached or has no such data set.
    """
    training = sources.training(data)
    held_out = sources.held_out(data, sum(len(source.places) for source in training))
    every = [*training, held_out] if held_out else training
    return _fingerprint_of([place for source in every for place in source.places])


def _fingerprint_of(places: list[sources.Place]) -> str:
    return cache.digest_of(*(place.fingerprint for place in places))


def _check_columns(training: list[Source]) -> None:
    """
    Raises:
        ConfigError: data.columns names a column that no format has, which would fail every row.
    """
    for source in training:
        try:
            formats.possible_formats(source.config.format, source.config.columns)
        except RowError as error:
            raise ConfigError(f"data.columns={source.config.columns} : {error}") from None


def evaluation_rows(config: Config, tokenizer: Any, used: Template) -> Dataset:
    """The held-out rows that `config.data` names, or all its rows where it holds none out, with prompt and reference.

    Raises:
        PreflightError: rows that cannot be used, each with file, row and reason, or none left.
    """
    work = _Work.of(config, tokenizer, used)
    converted, account = work.convert_held_out(work.held_out_masks(), or_all=True)
    work.raise_problems(account)
    if not converted:
        raise PreflightError(f"data.path={config.data.path}: no row is left to evaluate on ({account.counted})")
    return Dataset.from_list([{**row, "id": work.named(row["place"], row["number"])} for row in converted])


@dataclass
class _Work:
    """One preparation: its inputs, the key they make, and the entry that it fills."""

    config: Config
    tokenizer: Any
    template: Template
    training: list[Source]
    held_out: Source | None

    @classmethod
    def of(cls, config: Config, tokenizer: Any, used: Template) -> _Work:
        training = sources.training(config.data)
        held_out = sources.held_out(config.data, sum(len(source.places) for source in training))
        return cls(config, tokenizer, used, training, held_out)

    @property
    def every_source(self) -> list[Source]:
        return [*self.training, self.held_out] if self.held_out else self.training

    @property
    def places(self) -> list[sources.Place]:
        return [place for source in self.every_source for place in source.places]

    def named(self, place: int, number: int) -> str:
        return f"{self.places[place].name}:{number}"

    # ------------------------------------------------------------------------------------------------------- key

    def key(self) -> cache.Key:
        """Everything that changes tokens, and nothing else."""
        data = self.config.data
        return {
            "places": [[place.name for place in source.places] for source in self.every_source],
            "contents": [[place.fingerprint for place in source.places] for source in self.every_source],
            "held_out": self.held_out is not None,  # the last of them, then
            "format": [[s.config.format, s.config.columns] for s in self.every_source],
            "template": cache.digest_of(self.template.name, self.template.text),
            "tokenizer": _tokenizer_digest(self.tokenizer),
            "max_length": self.config.trainer.max_length,
            "sources": list(data.sources),  # their names, under which the facts count rows
            "selection": [[s.config.sample, s.config.max_rows, s.config.weight] for s in self.training],
            "seed": [data.seed, *(s.config.seed for s in self.training)] if self._draws() else None,
            **{name: getattr(data, name) for name in _DECIDING},
            "code": _code_digest(),
        }

    def _draws(self) -> bool:
        data = self.config.data
        sampled = any(source.config.sample < 1 for source in self.training)
        return sampled or data.mix != "concatenate" or _holds_out(data)

    # ----------------------------------------------------------------------------------------------------- build

    def build(self, folder: Path) -> None:
        masks = self.held_out_masks()
        held_out, account = self.convert_held_out(masks)
        leaks = duplicates.Leaks([row["text"] for row in held_out]) if held_out else None
        accounts = [
            convert.write(
                rows, self._converter(source, leaks), folder / f"train-{i}.arrow", _size([source]), self._hopeless
            )
            for i, (source, rows) in enumerate(self._training_rows(masks))
        ]
        total = Account()
        for other in accounts:
            total.add(other)
        self.raise_problems(account, total)
        parts = [Dataset.from_file(str(folder / f"train-{i}.arrow")) for i in range(len(accounts))]
        order, facts = arrange(self.config.data, self.training, parts, total)
        if order is not None:
            np.save(folder / "order.npy", order)
        if not (len(order) if order is not None else sum(map(len, parts))):
            raise PreflightError(f"data.path={self.config.data.path}: no row is left to train on ({total.counted})")
        if held_out:
            converter = self._converter(self.held_out or self.training[0], held_out=True)
            with convert.arrow_file(folder / "eval.arrow", converter.schema) as append:
                append(held_out)
        write_json(folder / "facts.json", facts | self._facts(account, total))

    def _facts(self, held_out: Account, total: Account) -> dict[str, Any]:
        return {
            "template": dataclasses.asdict(self.template),
            "pad": self.tokenizer.pad_token,
            "places": [place.name for place in self.places],
            "data_fingerprint": _fingerprint_of(self.places),
            "bad_rows": total.bad,
            "bad_eval_rows": held_out.bad,
            "dropped_rows": total.dropped,
            "dropped_eval_rows": held_out.dropped,
            "shortened_rows": total.shortened,
            "leaks": total.leaks,
        }

    def _converter(self, source: Source, leaks: duplicates.Leaks | None = None, held_out: bool = False) -> Converter:
        return Converter(
            self.config.data,
            self.config.trainer.max_length,
            self.tokenizer,
            self.template,
            source.config.format,
            source.config.columns,
            held_out=held_out,
            leaks=leaks,
            signatures=self.config.data.deduplicate == "near" or _size(self.training) <= _COMPARED_BYTES,
        )

    def held_out_masks(self) -> list[np.ndarray] | None:
        """Of each training source which rows are held out; None where the config holds none out of them.

        Raises:
            PreflightError: none would be left to train on.
        """
        data = self.config.data
        if not _holds_out(data):
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

    def _training_rows(self, masks: list[np.ndarray] | None) -> Iterator[tuple[Source, Iterator[RawRow]]]:
        """Each source with its rows, held-out ones left out, no more than data.train_rows over all of them."""
        data = self.config.data
        left = data.train_rows if data.train_rows >= 0 and data.mix == "concatenate" else None
        left = _STREAM_SAMPLE if data.streaming else left
        budget = iter(range(left)) if left is not None else itertools.count()
        for source, mask in zip(self.training, masks or itertools.repeat(None)):  # noqa: B905  as many as there are
            rows = iter(source) if mask is None else itertools.compress(source, ~mask)
            yield source, (row for row, _ in zip(rows, budget, strict=False))

    def _held_out_rows(self, masks: list[np.ndarray] | None, or_all: bool) -> Iterator[tuple[Source, Iterable[RawRow]]]:
        if self.held_out is not None:
            yield self.held_out, self.held_out
        elif masks is not None:
            for source, mask in zip(self.training, masks, strict=True):
                yield source, itertools.compress(source, mask)
        elif or_all:
            yield from ((source, source) for source in self.training)

    def convert_held_out(
        self, masks: list[np.ndarray] | None, or_all: bool = False
    ) -> tuple[list[dict[str, Any]], Account]:
        """Held-out rows, all in memory; with `or_all` every row where none is held out."""
        rows: list[dict[str, Any]] = []
        account = Account()
        for source, chosen in self._held_out_rows(masks, or_all):
            converted, part = self._converter(source, held_out=True).convert(chosen)
            rows += converted
            account.add(part)
        return rows, account

    def _hopeless(self, account: Account) -> bool:
        return account.read > _HOPELESS_ROWS and bool(
            account.too_long or (account.bad_count and self.config.data.on_bad_row == "error")
        )

    def raise_problems(self, *accounts: Account) -> None:
        """
        Raises:
            PreflightError: rows that were not to be there, each with file, row and reason.
        """
        problems: list[str] = []
        total = 0
        for account in accounts:
            listed = [*account.too_long, *(account.bad if self.config.data.on_bad_row == "error" else [])]
            total += len(account.too_long)
            total += account.bad_count if self.config.data.on_bad_row == "error" else 0
            problems += [f"{self.places[place].name}: row {n}: {reason}" for place, n, reason in listed]
        if not problems:
            return
        if any(account.bad_count for account in accounts) and self.config.data.on_bad_row == "error":
            problems[0] += " (data.on_bad_row=skip leaves such rows out and records which)"
        shown = problems[:_SHOWN]
        if total > _SHOWN:
            shown.append(f"and {total - _SHOWN} more rows")
        shown += [f"reading stopped after {account.read} rows" for account in accounts if account.stopped]
        raise PreflightError(shown)


_DECIDING = (
    "loss", "on_bad_row", "on_long_row", "truncation_side", "deduplicate", "on_leak", "mix", "train_rows", "eval_rows",
    "eval_fraction", "streaming",
)  # fmt: skip


def _holds_out(data: DataConfig) -> bool:
    return data.source != "requests" and (data.eval_rows > 0 or data.eval_fraction > 0)


def _size(sources: list[Source]) -> int:
    return sum(place.size_bytes for source in sources for place in source.places)


def _tokenizer_digest(tokenizer: Any) -> str:
    return cache.digest_of(tokenizer.backend_tokenizer.to_str(), json.dumps(tokenizer.special_tokens_map, default=str))


def _code_digest() -> str:
    """Of this package's own code and the libraries that decide how text becomes tokens."""
    own = sorted(Path(__file__).parent.glob("*.py"))
    return cache.digest_of(
        *(file.read_text(encoding="utf-8") for file in own), *(version(name) for name in ("transformers", "tokenizers"))
    )
