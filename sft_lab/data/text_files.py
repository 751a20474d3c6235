"""Rows of .txt, .csv, .jsonl and .json files, packed with gzip or not; `files.read_file` is the way in.

UTF-8 with or without a byte order mark is what is read; a line or row of other bytes is a problem of that row.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from sft_lab.data.unchanged import Version, opened
from sft_lab.errors import PreflightError

Row = tuple[int, Any, str | None]  # number from 1 (the line, where a row is a line), value, why it could not be read
Rows = Generator[Row, None, None]

_LONGEST_CELL = 1 << 26  # characters; a quote that is never closed must not take the rest of the file into memory
_ESCAPED = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of bytes that are no UTF-8
_CONSTANT = re.compile(r'"(?:[^"\\]++|\\.)*+"|NaN|-?Infinity')  # strings too, since they may hold the words
_SPACE = re.compile(r"[ \t\r\n]*")
_BY_LINE, _BY_FILE = "column {0.colno}", "line {0.lineno}, column {0.colno}"  # where in the JSON


@contextmanager
def _opened(path: Path, version: Version | None) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    """The unpacked bytes of a text file.

    Raises:
        PreflightError: its first bytes are those of another encoding, or of gzip under a name that does not say so.
    """
    packed = path.suffix.lower() == ".gz"
    with opened(path, version) as raw, gzip.GzipFile(fileobj=raw) if packed else nullcontext(raw) as file:
        head = file.peek(4)[:4]
        encoding = json.detect_encoding(head).upper()
        if head.startswith(b"\x1f\x8b"):
            raise PreflightError(f"{path}: is packed with gzip (allowed: the same under the name {path.name}.gz)")
        if head and not head.strip(b"\0"):
            raise PreflightError(f"{path}: begins with null bytes where text was expected")
        if not encoding.startswith("UTF-8"):
            raise PreflightError(f"{path}: is {encoding} (allowed: UTF-8; `iconv -f {encoding} -t UTF-8` converts it)")
        yield file


def _lines(file: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their number; files joined into one may each bring a byte order mark."""
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 ({error.reason} at byte {error.start + 1} of the line)"


def read_txt(path: Path, version: Version | None = None) -> Rows:
    """One row {"text": line} a line that is not blank."""
    with _opened(path, version) as file:
        for number, line in _lines(file):
            try:
                text = line.rstrip(b"\r\n").decode()
            except UnicodeDecodeError as error:
                yield number, None, _not_utf8(error)
                continue
            yield (number, None, "holds a null byte") if "\0" in text else (number, {"text": text}, None)


# ------------------------------------------------------------------------------------------------------------- CSV


def read_csv(path: Path, version: Version | None = None) -> Rows:
    """One row of texts a record, under the names of the header."""
    csv.field_size_limit(_LONGEST_CELL)
    where = "the header"
    with _opened(path, version) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        records = (cells for cells in csv.reader(text, strict=True) if cells)
        try:
            names = _header(path, next(records, []))
            where = "row 1"
            for number, cells in enumerate(records, start=1):
                problem = _cell_problem(names, cells)
                yield number, None if problem else dict(zip(names, cells, strict=True)), problem
                where = f"row {number + 1}"
        except csv.Error as error:
            hint = ", a quote is never closed" if "end of data" in str(error) or "limit" in str(error) else ""
            raise PreflightError(f"{path}: {where}: broken CSV ({error}{hint})") from None


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names):
        raise PreflightError(f"{path}: the header names a column twice ({', '.join(names)})")
    if problem := _cell_problem(names, names):
        raise PreflightError(f"{path}: the header: {problem}")
    return names


def _cell_problem(names: list[str], cells: list[str]) -> str | None:
    if len(cells) != len(names):
        return f"{'more' if len(cells) > len(names) else 'fewer'} cells than the header"
    if any(_ESCAPED.search(cell) for cell in cells):
        return "not UTF-8"
    return "holds a null byte" if any("\0" in cell for cell in cells) else None


# ------------------------------------------------------------------------------------------------------------ JSON


class Decoder(json.JSONDecoder):
    """JSON of the standard: what Python takes beyond it is a problem of the row, and so is a key that stands twice."""

    def __init__(self, where: str = _BY_LINE):
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant)
        self._where = where
        self._constants: list[str] = []
        self._twice: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            self._twice.append(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return found

    def _constant(self, name: str) -> None:
        self._constants.append(name)

    def value(self, text: str, place: int = 0) -> tuple[Any, int, str | None]:
        """The value that begins at a place, where the text goes on behind it, and the value's problem.

        Raises:
            json.JSONDecodeError: it is broken, so that nobody knows where it ends.
        """
        self._constants, self._twice = [], []
        try:
            value, end = self.raw_decode(text, _after_space(text, place))
        except json.JSONDecodeError:
            raise
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, place) from None
        except ValueError as error:  # Python's limit on the digits of a whole number
            raise json.JSONDecodeError(str(error).partition(":")[0], text, place) from None
        problem = self._problem(text, place, end)
        return None if problem else value, _after_space(text, end), problem

    def _problem(self, text: str, place: int, end: int) -> str | None:
        if self._constants:
            at = next(m.start() for m in _CONSTANT.finditer(text, place, end) if m[0][0] != '"')
            return self.broken(json.JSONDecodeError(f"{self._constants[0]} is no JSON", text, at))
        if self._twice:
            return f"key {json.dumps(self._twice[0], ensure_ascii=False)} stands twice"
        return "not UTF-8" if _ESCAPED.search(text, place, end) else None

    def whole(self, text: str) -> tuple[Any, str | None]:
        """The one value of a text, and its problem; raises json.JSONDecodeError."""
        value, end, problem = self.value(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value, problem

    def broken(self, error: json.JSONDecodeError) -> str:
        return f"broken JSON ({error.msg.removesuffix(' at')} at {self._where.format(error)})"


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def read_jsonl(path: Path, version: Version | None = None) -> Rows:
    """One value a line; whether it is an object is for the formats to say."""
    decoder = Decoder()
    with _opened(path, version) as file:
        for number, line in _lines(file):
            try:
                yield number, *decoder.whole(line.decode())
            except UnicodeDecodeError as error:
                yield number, None, _not_utf8(error)
            except json.JSONDecodeError as error:
                yield number, None, decoder.broken(error)


def read_json(path: Path, version: Version | None = None) -> Rows:
    """An array of rows, one row a line, or one row alone over several lines; all but one a line is read in one go."""
    with _opened(path, version) as file:
        first = next((line for _, line in _lines(file)), b"").strip()
        by_line = not first.startswith(b"[") and _is_json(first)
        file.seek(0)
        text = "" if by_line else file.read().decode("utf-8-sig", errors="surrogateescape")
    decoder = Decoder(_BY_FILE)
    if first.startswith(b"["):
        yield from _array(path, decoder, text)
        return
    if not by_line:
        try:
            yield 1, *decoder.whole(text)
            return
        except json.JSONDecodeError as error:
            if first == b"{":  # as whoever indents writes it; no row of one a line begins so
                raise PreflightError(f"{path}: row 1: {decoder.broken(error)}") from None
    del text
    yield from read_jsonl(path, version)


def _is_json(line: bytes) -> bool:
    try:
        Decoder().whole(line.decode(errors="surrogateescape"))
    except json.JSONDecodeError:
        return False
    return True


def _array(path: Path, decoder: Decoder, text: str) -> Rows:
    number, place = 0, _after_space(text, text.index("[") + 1)
    closed = text[place : place + 1] == "]"
    try:
        while not closed:
            number += 1
            value, place, problem = decoder.value(text, place)
            if text[place : place + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
            yield number, value, problem
            closed = text[place] == "]"
            place = place if closed else place + 1
        place = _after_space(text, place + 1)
        if place < len(text):
            number += 1
            raise json.JSONDecodeError("Extra data", text, place)
    except json.JSONDecodeError as error:
        raise PreflightError(f"{path}: row {number}: {decoder.broken(error)}") from None
