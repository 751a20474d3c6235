"""Where rows come from: files, the hub, the embedded generator. Each row carries the place it was read from."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_lab.data.formats import RowError
from sft_lab.errors import PreflightError, RunError
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
            if not line.strip():
                continue
            try:
                yield number, _loads(line.decode("utf-8-sig" if number == 1 else "utf-8")), None
            except UnicodeDecodeError as error:
                yield number, None, f"not UTF-8 ({error.reason} at byte {error.start + 1} of the line)"
            except json.JSONDecodeError as error:
                yield number, None, f"broken JSON ({error.msg} at column {error.colno})"


def _read_json(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        value = _loads(text)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # one object a line, in a file that is called .json
            yield from _read_jsonl(path)
            return
        row = _complete_objects_before(text, error.pos) + 1
        raise RowError(f"row {row}: broken JSON ({error.msg} at line {error.lineno}, column {error.colno})") from None
    values = value if isinstance(value, list) else [value]
    yield from ((number, row, None) for number, row in enumerate(values, start=1))


def _complete_objects_before(text: str, position: int) -> int:
    """How many elements of a JSON array end before `position`: so many rows are good before a syntax error."""
    decoder, place, count = json.JSONDecoder(), text.find("[") + 1, 0
    while place > 0:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        try:
            _, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            return count
        if place > position:
            return count
        count += 1
    return count


def _loads(text: str) -> Any:
    def refuse_constant(name: str) -> Any:
        raise json.JSONDecodeError(f"{name} is no JSON", text, text.find(name))

    return json.loads(text, parse_constant=refuse_constant)


def _read_csv(path: Path) -> Iterator[tuple[int, Any, str | None]]:
    csv.field_size_limit(sys.maxsize)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file, strict=True), start=1):
                extra = row.pop(None, None)  # type: ignore[call-overload]
                wrong = (
                    "more cells than the header"
                    if extra
                    else "fewer cells than the header"
                    if None in row.values()
                    else None
                )
                yield number, row, wrong
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 ({error.reason} at byte {error.start + 1})") from None
    except csv.Error as error:
        raise RowError(f"broken CSV ({error})") from None


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
