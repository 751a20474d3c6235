"""The data of one run, made in one process before any rank: read, template, tokenize, mask, cut or drop, mix.

What comes out is a cache entry, whose files `prepared` names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from sft_lab import model as models
from sft_lab.data import cache, convert, duplicates, formats, template
from sft_lab.data.arrange import arrange
from sft_lab.data.convert import Account, Converter
from sft_lab.data.formats import RowError
from sft_lab.data.prepared import Prepared
from sft_lab.data.selection import Selection
from sft_lab.data.sources import Source
from sft_lab.data.template import Template
from sft_lab.errors import ConfigError, Interrupted, PreflightError
from sft_lab.runs import write_json
from sft_lab.schema import Config, DataConfig

_SHOWN = 20  # problems listed in an error; the rest is counted
_COMPARED_BYTES = 16 << 20  # up to here near duplicates are looked for unasked; it takes 0.2 ms a row
_HOPELESS_ROWS = 20_000  # where a row is bad, reading goes on up to here to list the others, and no further


def prepare(config: Config) -> Prepared:
    """Everything that a run trains and is evaluated on.

    Raises:
        PreflightError: rows that cannot be trained on (each with file, row and reason), or none left.
        RunError: the model's tokenizer or a hub data set cannot be had.
    """
    tokenizer = models.load_tokenizer(config.model)
    asked = config.chat_template
    used = template.apply(tokenizer, asked.name, asked.path, asked.kwargs, asked.date)
    work = _Work(config, tokenizer, used, Selection.of(config.data))
    _check_columns(work.selection.training)
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
    return Selection.of(data).fingerprint


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
    work = _Work(config, tokenizer, used, Selection.of(config.data))
    with work.unchanged():
        converted, account = work.convert_held_out(or_all=True)
        work.raise_problems(account)
    if not converted:
        raise PreflightError(f"data.path={config.data.path}: no row is left to evaluate on ({account.counted})")
    return Dataset.from_list([{**row, "id": work.selection.named(row["place"], row["number"])} for row in converted])


@dataclass
class _Work:
    """One preparation: its inputs, the key they make, and the entry that it fills."""

    config: Config
    tokenizer: Any
    template: Template
    selection: Selection

    # ------------------------------------------------------------------------------------------------------- key

    def key(self) -> cache.Key:
        """Everything that changes tokens, and nothing else."""
        data, selection = self.config.data, self.selection
        return {
            "places": [[place.name for place in source.places] for source in selection.every_source],
            "contents": [[place.fingerprint for place in source.places] for source in selection.every_source],
            "held_out": selection.held_out is not None,  # the last of them, then
            "format": [[s.config.format, s.config.columns] for s in selection.every_source],
            "ignore_columns": [sorted(s.ignored) for s in selection.every_source],
            "template": cache.digest_of(json.dumps(dataclasses.asdict(self.template), sort_keys=True)),
            "tokenizer": _tokenizer_digest(self.tokenizer),
            "max_length": self.config.trainer.max_length,
            "sources": list(data.sources),  # their names, under which the facts count rows
            "selection": [[s.config.sample, s.config.max_rows, s.config.weight] for s in selection.training],
            "seed": [data.seed, *(s.config.seed for s in selection.training)] if selection.draws else None,
            **{name: getattr(data, name) for name in _DECIDING},
            "code": _code_digest(),
        }

    # ----------------------------------------------------------------------------------------------------- build

    def build(self, folder: Path) -> None:
        with self.unchanged():
            self._build(folder)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """
        Raises:
            PreflightError: a file changed meanwhile; it is then the reason for whatever else went wrong.
        """
        try:
            yield
        except Interrupted:
            raise
        except Exception:
            self.selection.require_unchanged()
            raise
        self.selection.require_unchanged()

    def _build(self, folder: Path) -> None:
        selection = self.selection
        held_out, account = self.convert_held_out()
        leaks = duplicates.Leaks([row["text"] for row in held_out]) if held_out else None
        accounts = [
            convert.write(
                rows, self._converter(source, leaks), folder / f"train-{i}.arrow", _size([source]), self._hopeless
            )
            for i, (source, rows) in enumerate(selection.training_rows())
        ]
        total = Account()
        for other in accounts:
            total.add(other)
        self.raise_problems(account, total)
        parts = [Dataset.from_file(str(folder / f"train-{i}.arrow")) for i in range(len(accounts))]
        order, facts = arrange(self.config.data, selection.training, parts, total)
        if order is not None:
            np.save(folder / "order.npy", order)
        if not (len(order) if order is not None else sum(map(len, parts))):
            raise PreflightError(f"data.path={self.config.data.path}: no row is left to train on ({total.counted})")
        if held_out:
            converter = self._converter(selection.held_out or selection.training[0], held_out=True)
            with convert.arrow_file(folder / "eval.arrow", converter.schema) as append:
                append(held_out)
        write_json(folder / "facts.json", facts | self._facts(account, total))

    def _facts(self, held_out: Account, total: Account) -> dict[str, Any]:
        return {
            "template": dataclasses.asdict(self.template),
            "pad": self.tokenizer.pad_token,
            "places": [place.name for place in self.selection.places],
            "data_fingerprint": self.selection.fingerprint,
            "bad_rows": total.bad,
            "bad_eval_rows": held_out.bad,
            "dropped_rows": total.dropped,
            "dropped_eval_rows": held_out.dropped,
            "shortened_rows": total.shortened,
            "leaks": total.leaks,
            "unread_columns": total.unread.columns + held_out.unread.columns,
            "unread_message_keys": total.unread.keys + held_out.unread.keys,
            "null_arguments": total.unread.nulls + held_out.unread.nulls,
        }

    def _converter(self, source: Source, leaks: duplicates.Leaks | None = None, held_out: bool = False) -> Converter:
        return Converter(
            self.config.data,
            self.config.trainer.max_length,
            self.tokenizer,
            self.template,
            source.config.format,
            source.config.columns,
            source.ignored,
            held_out=held_out,
            leaks=leaks,
            signatures=self.config.data.deduplicate == "near" or _size(self.selection.training) <= _COMPARED_BYTES,
        )

    def convert_held_out(self, or_all: bool = False) -> tuple[list[dict[str, Any]], Account]:
        """Held-out rows, all in memory; with `or_all` every row where none is held out."""
        rows: list[dict[str, Any]] = []
        account = Account()
        for source, chosen in self.selection.held_out_rows(or_all):
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
            problems += [f"{self.selection.places[place].name}: row {n}: {reason}" for place, n, reason in listed]
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
    "loss", "on_bad_row", "on_long_row", "on_context_mismatch", "truncation_side", "deduplicate", "on_leak", "mix",
    "train_rows", "eval_rows", "eval_fraction", "streaming",
)  # fmt: skip


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
