"""Raw rows to tokens in an Arrow file, with an account of every row that did not become one.

Rows stream through in chunks, in this process or in several, so that memory does not grow with their number.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from sft_lab.data import duplicates, formats, tokenize
from sft_lab.data.formats import Conversation, Example, LeftOut, RowError, Text
from sft_lab.data.sources import RawRow
from sft_lab.data.spans import ContextError
from sft_lab.data.template import Template
from sft_lab.data.tokenize import IGNORE, Encoded
from sft_lab.data.unread import Unread
from sft_lab.schema import DataConfig

_CHUNK = 500  # rows
_MANY_BYTES = 64 << 20  # from here on starting processes, some seconds each, pays
_LISTED = 1000  # problems kept in words; all are counted

_IDS = pa.list_(pa.int32())
_COLUMNS = {
    "place": pa.int32(), "number": pa.int64(), "part": pa.int32(), "input_ids": _IDS, "labels": _IDS,
    "length": pa.int32(), "supervised": pa.int32(), "turns": pa.string(), "notes": pa.string(), "digest": pa.int64(),
    "answer": pa.int64(),
}  # fmt: skip
_PROMPT = {"prompt_ids": _IDS, "reference": pa.string(), "text": pa.string()}
_SIGNATURE = {"signature": pa.binary()}
RowName = tuple[int, int]  # place and number


_MISMATCH = {
    "context_differs": "what stands before a learned turn is not what the model is asked with",
    "other_turn_end": "a learned turn ends with a token at which an answer does not stop",
}


class _TooLong(RowError):
    """An error even where bad rows are left out: data.on_long_row=error asks for it."""


@dataclass
class Account:
    """What became of the rows that were read."""

    read: int = 0
    stopped: bool = False  # before all was read, since that was no use
    dropped: dict[str, list[RowName]] = field(default_factory=dict)
    bad: list[tuple[int, int, str]] = field(default_factory=list)  # place, number, reason
    bad_count: int = 0
    too_long: list[tuple[int, int, str]] = field(default_factory=list)
    shortened: dict[str, list[RowName]] = field(default_factory=dict)  # by truncate or split
    leaks: list[tuple[int, int, int, str]] = field(default_factory=list)  # place, number, held-out row, exact or near
    unread: Unread = field(default_factory=Unread)

    @property
    def counted(self) -> dict[str, int]:
        """Rows left out, by reason."""
        return {reason: len(rows) for reason, rows in self.dropped.items()}

    def add(self, other: Account) -> None:
        self.read += other.read
        self.stopped |= other.stopped
        self.bad_count += other.bad_count
        self.bad += other.bad[: max(_LISTED - len(self.bad), 0)]
        self.too_long += other.too_long
        self.leaks += other.leaks
        self.unread.add(other.unread)
        for mine, theirs in ((self.dropped, other.dropped), (self.shortened, other.shortened)):
            for reason, rows in theirs.items():
                mine.setdefault(reason, []).extend(rows)


@dataclass
class Converter:
    """How rows of one source become tokens; a copy of it goes to each process."""

    data: DataConfig
    max_length: int
    tokenizer: Any
    template: Template
    format: str
    columns: dict[str, str]
    ignored: frozenset[str] = frozenset()  # columns, and keys of messages, that count as absent
    held_out: bool = False  # with prompt_ids and reference, for generation, and text, to find leaks
    leaks: duplicates.Leaks | None = None
    signatures: bool = False  # to find near duplicates

    @property
    def schema(self) -> pa.Schema:
        more = _PROMPT if self.held_out else _SIGNATURE if self.signatures else {}
        return pa.schema({**_COLUMNS, **more})

    def convert(self, rows: Iterable[RawRow]) -> tuple[list[dict[str, Any]], Account]:
        account = Account()
        converted: list[dict[str, Any]] = []
        for row in rows:
            account.read += 1
            try:
                converted += self._convert(row, account)
            except LeftOut as reason:
                account.dropped.setdefault(str(reason), []).append((row.place, row.number))
            except _TooLong as error:
                account.too_long.append((row.place, row.number, str(error)))
            except RowError as error:
                account.bad_count += 1
                if len(account.bad) < _LISTED:
                    account.bad.append((row.place, row.number, str(error)))
                account.dropped.setdefault("bad", []).append((row.place, row.number))
        return converted, account

    def _convert(self, row: RawRow, account: Account) -> list[dict[str, Any]]:
        if row.problem:
            raise RowError(row.problem)
        try:
            return self._parts(row, account)
        except RecursionError:  # of JSON that a template writes, deeper in the stack than it was read
            raise RowError("nested too deeply") from None

    def _parts(self, row: RawRow, account: Account) -> list[dict[str, Any]]:
        example = formats.to_example(row.value, self.format, self.columns, self.ignored, account.unread)
        text = formats.text_of(example, system=False, thoughts=False)
        whole = duplicates.digest(formats.text_of(example))
        more: dict[str, Any] = {"digest": whole, "answer": duplicates.digest(_answer(example, text))}
        if self.held_out:
            more |= self._prompt(example) | {"text": text}
        elif self.signatures:
            more["signature"] = duplicates.signature(formats.text_of(example, system=False))
        parts = self._fitting(row, example, self._in_context(row, example, account), account)
        self._look_for_leaks(row, text, account)
        number = itertools.count(0 if len(parts) == 1 else 1)
        return [{**self._columns(row, part), "part": next(number), **more} for part in parts]

    def _encode(self, example: Example) -> Encoded:
        encoded = tokenize.encode(self.tokenizer, example, self.template, self.data.loss)
        if all(label == IGNORE for label in encoded.labels):
            raise RowError(f"no token of it carries loss (data.loss={self.data.loss})")
        return encoded

    def _in_context(self, row: RawRow, example: Example, account: Account) -> list[Encoded]:
        """The row, or one for each of its turns where they are not what the model is asked with and ends with.

        Raises:
            RowError: data.on_context_mismatch=error; or as `encode` does.
        """
        how = self.data.on_context_mismatch
        try:
            encoded = self._encode(example)
        except ContextError:
            if how != "split" or not isinstance(example, Conversation):
                raise
        else:
            mismatch = _MISMATCH.keys() & set(encoded.notes)
            if not mismatch or how == "warn" or not isinstance(example, Conversation):
                return [encoded]
            if how == "error":
                told = " and ".join(_MISMATCH[name] for name in sorted(mismatch))
                raise RowError(f"{told} (data.on_context_mismatch=error)")
        account.shortened.setdefault("split_by_turn", []).append((row.place, row.number))
        return tokenize.by_turn(self.tokenizer, example, self.template, self.data.loss)

    def _fitting(self, row: RawRow, example: Example, turns: list[Encoded], account: Account) -> list[Encoded]:
        """What is left of a row, or of its turns where they train apart, within max_length tokens.

        Raises:
            LeftOut, _TooLong: as `_shorten` does, of all of it.
        """
        whole = example if len(turns) == 1 and not turns[0].apart else None
        fitting: list[Encoded] = []
        lost = 0
        for encoded in turns:
            try:
                short = len(encoded.input_ids) <= self.max_length
                fitting += [encoded] if short else self._shorten(row, whole, encoded, account)
            except LeftOut:
                lost += 1
        if not fitting:
            raise LeftOut("long")
        if lost:
            account.shortened.setdefault("split_in_part", []).append((row.place, row.number))
        return fitting

    def _columns(self, row: RawRow, encoded: Encoded) -> dict[str, Any]:
        return {
            "place": row.place,
            "number": row.number,
            "input_ids": encoded.input_ids,
            "labels": encoded.labels,
            "length": len(encoded.input_ids),
            "supervised": sum(label != IGNORE for label in encoded.labels),
            "turns": " ".join(f"{role}{'+' if trained else ''}" for role, trained in encoded.turns),
            "notes": " ".join(encoded.notes),
        }

    def _prompt(self, example: Example) -> dict[str, Any]:
        """Text and tokens have no question to be asked: their loss is measured, but nothing is generated."""
        if not isinstance(example, Conversation):
            return {"prompt_ids": [], "reference": ""}
        prompt_ids, reference = tokenize.prompt_and_reference(self.tokenizer, example, self.template)
        return {"prompt_ids": prompt_ids, "reference": reference}

    def _look_for_leaks(self, row: RawRow, text: str, account: Account) -> None:
        found = self.leaks.find(text) if self.leaks is not None else []
        account.leaks += [(row.place, row.number, index, kind) for index, kind in found]
        if found and self.data.on_leak == "drop":
            raise LeftOut("leak")

    def _shorten(self, row: RawRow, example: Example | None, encoded: Encoded, account: Account) -> list[Encoded]:
        """What is left of a row of more than max_length tokens; without `example` it is a turn and cannot be split.

        Raises:
            LeftOut: nothing is, or nothing that could be learned from.
            _TooLong: data.on_long_row=error.
        """
        how = self.data.on_long_row
        if how == "error":
            raise _TooLong(f"{len(encoded.input_ids)} tokens, more than trainer.max_length={self.max_length}")
        parts: list[Encoded] = []
        if how == "truncate":
            parts = [self._truncated(encoded)]
        elif how == "split" and isinstance(example, Conversation):
            pieces = tokenize.split(
                example, lambda piece: len(self._tokens_of(piece)) <= self.max_length, self.data.loss
            )
            parts = [tokenize.encode(self.tokenizer, piece, self.template, self.data.loss) for piece in pieces]
        elif how == "split" and isinstance(example, Text):
            parts = [
                self._cut(encoded, start, start + self.max_length)
                for start in range(0, len(encoded.input_ids), self.max_length)
            ]
        kept = [p for p in parts if len(p.input_ids) <= self.max_length and any(x != IGNORE for x in p.labels)]
        if not kept:
            raise LeftOut("long")
        name = (row.place, row.number)
        account.shortened.setdefault("truncated" if how == "truncate" else how, []).append(name)
        if len(kept) < len(parts):
            account.shortened.setdefault("split_in_part", []).append(name)
        return kept

    def _tokens_of(self, piece: Conversation) -> list[int]:
        return tokenize.encode(self.tokenizer, piece, self.template, "all").input_ids

    def _truncated(self, encoded: Encoded) -> Encoded:
        if self.data.truncation_side == "left":
            return self._cut(encoded, len(encoded.input_ids) - self.max_length, len(encoded.input_ids))
        return self._cut(encoded, 0, self.max_length)

    def _cut(self, encoded: Encoded, start: int, end: int) -> Encoded:
        ids, labels = encoded.input_ids[start:end], encoded.labels[start:end]
        if labels:
            labels[0] = IGNORE  # nothing comes before it that could predict it
        return Encoded(ids, labels, [*encoded.notes, "cut"], encoded.turns)


def _answer(example: Example, text: str) -> str:
    """What the assistant says in a row, all of it where there are no turns."""
    if not isinstance(example, Conversation):
        return text
    return " ".join(message["content"] for message in example.messages if message["role"] == "assistant")


@contextlib.contextmanager
def arrow_file(path: Path, schema: pa.Schema) -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """A file that `datasets` maps into memory; gives what appends rows to it."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        yield lambda rows: writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def write(
    rows: Iterable[RawRow], converter: Converter, path: Path, size_bytes: int, stop: Callable[[Account], bool]
) -> Account:
    """Convert `rows` into the Arrow file `path`, in their order, until `stop` says that going on is no use."""
    account = Account()
    iterator = iter(rows)
    chunks = iter(lambda: list(itertools.islice(iterator, _CHUNK)), [])
    with arrow_file(path, converter.schema) as append:
        for converted, part in _converted(chunks, converter, _processes(converter.data.num_proc, size_bytes)):
            account.add(part)
            if converted:
                append(converted)
            if stop(account):
                account.stopped = True
                break
    return account


def _processes(asked: int, size_bytes: int) -> int:
    if asked:
        return asked
    return min(os.cpu_count() or 1, 8) if size_bytes > _MANY_BYTES else 1


def _converted(
    chunks: Iterator[list[RawRow]], converter: Converter, processes: int
) -> Iterator[tuple[list[dict[str, Any]], Account]]:
    if processes == 1:
        yield from map(converter.convert, chunks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of torch and tokenizers
    with ProcessPoolExecutor(processes, context, _start_worker, (converter,)) as pool:
        waiting: deque[Future] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_work, chunk))
                if len(waiting) > 2 * processes:  # read no further ahead than the workers can use
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


_worker: list[Converter] = []  # of this process, set when it starts


def _start_worker(converter: Converter) -> None:
    _worker.append(converter)


def _work(chunk: list[RawRow]) -> tuple[list[dict[str, Any]], Account]:
    return _worker[0].convert(chunk)
