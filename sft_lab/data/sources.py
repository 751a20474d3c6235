"""Where rows come from: files, the hub, the embedded generator. Each row carries the place it was read from."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_lab.data.formats import RowError
from sft_lab.errors import PreflightError, RunError, SftLabError
from sft_lab.schema import DataConfig


@dataclass
class RawRow:
    """A row as read, or the reason it could not be."""

    source: str  # the file, or the hub id and split
    number: int  # counted from 1; in .jsonl the line
    value: Any = None
    problem: str | None = None

    @property
    def id(self) -> str:
        return f"{self.source}:{self.number}"


def read(data: DataConfig, seed: int) -> tuple[list[RawRow], list[RawRow]]:
    """Training and held-out rows as the config names them; the latter is empty where it names none.

    Raises:
        PreflightError: a file cannot be read at all, or is of no known kind.
        RunError: the hub cannot be reached or has no such data set.
    """
    if data.source == "requests":
        from sft_lab.data.requests import generate

        train, held_out = generate(data.train_rows, max(data.eval_rows, 0), seed)
        return _numbered("requests/train", train), _numbered("requests/eval", held_out)
    if data.source == "file":
        return read_file(data.path), read_file(data.eval_path) if data.eval_path else []
    return _read_hub(data, data.split), _read_hub(data, data.eval_split) if data.eval_split else []


def fingerprint(data: DataConfig, rows: list[RawRow]) -> str:
    """A digest of the rows' contents, whatever file they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.value, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _numbered(source: str, values: list[Any]) -> list[RawRow]:
    return [RawRow(source, number, value) for number, value in enumerate(values, start=1)]


def _read_hub(data: DataConfig, split: str) -> list[RawRow]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(data.path, data.name or None, split=split, revision=data.revision)
    except SftLabError:  # a signal's
        raise
    except Exception as error:  # whatever the hub client raises, its first line is what the person needs
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RunError(f"data.path={data.path}: the hub gave no such data set ({reason})") from error
    return _numbered(f"{data.path}[{split}]", list(dataset))


# ---------------------------------------------------------------------------------------------------------- files


def read_file(path: str) -> list[RawRow]:
    """Every row of a .jsonl, .json, .csv or .parquet file, by the file's ending.

    Raises:
        PreflightError: it is missing, of another kind, empty, or broken as a whole.
    """
    reader = _READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise PreflightError(f"{path}: no known kind of file (allowed: {', '.join(_READERS)})")
    try:
        rows = [RawRow(path, *numbered) for numbered in reader(Path(path))]
    except OSError as error:
        raise PreflightError(f"{path}: cannot be read ({error.strerror or error})") from None
    except RowError as error:
        raise PreflightError(f"{path}: {error}") from None
    if not rows:
        raise PreflightError(f"{path}: holds no row")
    return rows


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield number, _JSON.decode(line.decode()), None
            except UnicodeDecodeError as error:
                yield number, None, f"not UTF-8 ({error.reason} at byte {error.start + 1} of the line)"
            except json.JSONDecodeError as error:
                yield number, None, f"broken JSON ({error.msg} at column {error.colno})"
            except _NoJson as error:
                yield number, None, f"broken JSON ({error} at column {_constant(line.decode(), 0) + 1})"
            except RecursionError:
                yield number, None, "broken JSON (nested too deeply)"


def _read_json(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    """An array of rows, one row alone, or one a line."""
    text = _decoded(path)
    place = _skip(text, 0, " \t\r\n")
    if place == len(text):
        return
    if text[place] != "[":
        try:
            row = _JSON.decode(text)
            yield 1, row, _not_utf8(row)
        except (json.JSONDecodeError, _NoJson, RecursionError):
            yield from _read_jsonl(path)
        return
    number, place = 1, _skip(text, place + 1, " \t\r\n")
    while text[place : place + 1] != "]":
        try:
            row, place = _JSON.raw_decode(text, place)
            place = _skip(text, place, " \t\r\n")
            if text[place : place + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        except json.JSONDecodeError as error:
            where = f"{error.msg} at line {error.lineno}, column {error.colno}"
            raise RowError(f"row {number}: broken JSON ({where})") from None
        except _NoJson as error:
            at = json.JSONDecodeError("", text, _constant(text, place))
            raise RowError(f"row {number}: broken JSON ({error} at line {at.lineno}, column {at.colno})") from None
        except RecursionError:
            raise RowError(f"row {number}: broken JSON (nested too deeply)") from None
        yield number, row, _not_utf8(row)
        number, place = number + 1, _skip(text, place, " \t\r\n,")


class _NoJson(ValueError):
    """NaN and its like, which Python's decoder would take."""


def _refuse_constant(name: str) -> Any:
    raise _NoJson(f"{name} is no JSON")


def _constant(text: str, place: int) -> int:
    """Where the first NaN or Infinity outside a string stands."""
    found = (m.start() for m in re.finditer(r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity', text[place:]) if m[0][0] != '"')
    return place + next(found)


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def _skip(text: str, place: int, characters: str) -> int:
    while place < len(text) and text[place] in characters:
        place += 1
    return place


def _decoded(path: Path) -> str:
    """The file's text; bytes that are no UTF-8 become lone surrogates, which `_not_utf8` finds in their row."""
    return path.read_bytes().decode("utf-8-sig", errors="surrogateescape")


def _not_utf8(row: Any) -> str | None:
    escaped = re.search("[\udc80-\udcff]", json.dumps(row, ensure_ascii=False, default=str))
    return "not UTF-8" if escaped else None


def _read_csv(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(_decoded(path), newline=""), strict=True)
    number = 0
    try:
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise RowError(f"the header names a column twice ({', '.join(names)})")
        for number, row in enumerate(reader, start=1):
            problem = _not_utf8(row)
            if row.pop(None, None):
                problem = "more cells than the header"
            elif None in row.values():
                problem = "fewer cells than the header"
            yield number, row, problem
    except csv.Error as error:
        raise RowError(f"row {number + 1}: broken CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise RowError(f"broken Parquet ({str(error).splitlines()[0]})") from None
    yield from ((number, row, None) for number, row in enumerate(values, start=1))


_READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any, str | None]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
