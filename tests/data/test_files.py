"""Files as people have them: every kind, and every way in which one can be broken or odd."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import json
import os
import re
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from sft_lab.data.files import KINDS, files_of, fingerprint, read_file
from sft_lab.errors import PreflightError


def _gzip(content: bytes) -> bytes:
    """The same bytes whenever it is asked: without the time of day, by which parallel workers' cases would differ."""
    return gzip.compress(content, mtime=0)


ROWS = [{"prompt": f"question {i} ü🙂", "completion": f"line\nnext {i}"} for i in range(3)]
LINES = [json.dumps(row, ensure_ascii=i != 1) for i, row in enumerate(ROWS)]
JSONL = "\n".join(LINES)
NAN = float("nan")


def write_csv(path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def csv_bytes(path: Path) -> bytes:
    write_csv(path)
    return path.read_bytes()


def write_parquet(path: Path, rows: list[Any] = ROWS, **options: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)


def write_stream(path: Path, rows: list[Any] = ROWS, batch: int = 2) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)


def write_arrow_file(path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: path.write_text(JSONL, encoding="utf-8"),
    "ends-with-newline.jsonl": lambda path: path.write_text(JSONL + "\n", encoding="utf-8"),
    "byte-order-mark.jsonl": lambda path: path.write_text(JSONL, encoding="utf-8-sig"),
    "windows.jsonl": lambda path: path.write_bytes("\r\n".join(LINES).encode("utf-8-sig")),
    "joined.jsonl": lambda path: path.write_bytes(b"\n".join(line.encode("utf-8-sig") for line in LINES)),
    "UPPER.JSONL": lambda path: path.write_text(JSONL, encoding="utf-8"),
    "rows.v1.2.jsonl": lambda path: path.write_text(JSONL, encoding="utf-8"),
    "rows.jsonl.gz": lambda path: path.write_bytes(_gzip(JSONL.encode())),
    "two-members.jsonl.gz": lambda path: path.write_bytes(_gzip(JSONL[:99].encode()) + _gzip(JSONL[99:].encode())),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8"),
    "one-line-array.json": lambda path: path.write_text("\n  " + json.dumps(ROWS) + "\n\n", encoding="utf-8"),
    "byte-order-mark.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    "lines.json": lambda path: path.write_text(JSONL, encoding="utf-8"),
    "array.json.gz": lambda path: path.write_bytes(_gzip(json.dumps(ROWS, indent=1).encode("utf-8-sig"))),
    "lines.JSON.GZ": lambda path: path.write_bytes(_gzip(JSONL.encode())),
    "rows.csv": write_csv,
    "byte-order-mark.csv": lambda path: path.write_bytes(b"\xef\xbb\xbf" + csv_bytes(path)),
    "blank-lines.csv": lambda path: path.write_bytes(b"\n\r\n" + csv_bytes(path) + b"\n\n"),
    "rows.csv.gz": lambda path: path.write_bytes(_gzip(csv_bytes(path))),
    "rows.parquet": write_parquet,
    "row-groups.parquet": lambda path: write_parquet(path, row_group_size=1),
    "stream.arrow": write_stream,
    "file.arrow": write_arrow_file,
}


def read(path: Path) -> list[tuple[int, Any, str | None]]:
    return list(read_file(path))


def values(path: Path) -> list[Any]:
    """The values of a file whose rows are all fine and numbered one by one."""
    rows = read(path)
    assert [row[2] for row in rows] == [None] * len(rows)
    assert [row[0] for row in rows] == list(range(1, len(rows) + 1))
    return [row[1] for row in rows]


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_gives_the_same_numbered_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert values(tmp_path / name) == ROWS
    assert files_of(str(tmp_path / name)) == [tmp_path / name]


def test_every_kind_that_messages_allow_is_read(tmp_path: Path) -> None:
    read_here = {re.search(r"\.\w+(\.gz)?$", name.lower())[0] for name in WRITERS}
    assert set(KINDS.split(", ")) == read_here | {".txt", ".txt.gz"}


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_each_line_of_a_text_that_is_not_blank_is_a_row(name: str, tmp_path: Path) -> None:
    """U+2028 and a form feed end no line, for an editor's line number must be the row's."""
    content = "\ufefffirst\r\n\r\n   \n  indented \n a\u2028b\x0cc\nlast ü".encode()
    (tmp_path / name).write_bytes(_gzip(content) if name.endswith("gz") else content)
    assert read(tmp_path / name) == [
        (1, {"text": "first"}, None),
        (4, {"text": "  indented "}, None),
        (5, {"text": " a\u2028b\x0cc"}, None),
        (6, {"text": "last ü"}, None),
    ]


def test_rows_of_jsonl_are_numbered_by_line(tmp_path: Path) -> None:
    """An editor must find the row where the message says it is."""
    (tmp_path / "a.jsonl").write_text(f"\n{LINES[0]}\n   \n\r\n{LINES[1]}\n\n", encoding="utf-8")
    assert read(tmp_path / "a.jsonl") == [(2, ROWS[0], None), (5, ROWS[1], None)]


@pytest.mark.parametrize("write", [write_parquet, write_stream])
def test_columns_keep_nested_messages(write: Callable[[Path, list[Any]], None], tmp_path: Path) -> None:
    """Arrow gives every object all keys of the column, with nulls: they are left out again."""
    path = tmp_path / f"a{'.parquet' if write is write_parquet else '.arrow'}"
    write(path, [{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "name": "x"}]}, {"messages": None}])
    assert values(path) == [
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "name": "x"}]},
        {"messages": None},
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_what_datasets_stores_as_json_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """Arguments of tool calls have other keys in each row; `datasets` writes such a column as JSON texts."""
    rows = [{"calls": [{"name": "f", "arguments": {"q": 1}}]}, {"calls": [{"arguments": {"z": ["s", None]}}]}]
    data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    if name == "a.parquet":
        data.to_parquet(tmp_path / name)
    else:
        data.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / "data-00000-of-00001.arrow").rename(tmp_path / name)
    assert values(tmp_path / name) == rows


# ------------------------------------------------------------------------------------------------------- odd rows


def long_row(name: str) -> bytes:
    text = "xü\\n" * 2_500_000  # 10 MB and more
    return f'prompt,n\n"{text}",1\n'.encode() if name == "a.csv" else f'{{"prompt": "{text}", "n": "1"}}'.encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_row_of_10_megabytes_is_a_row_like_others(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name in ("a.parquet", "a.arrow"):
        (write_parquet if name == "a.parquet" else write_stream)(path, [{"prompt": "xü\n" * 2_500_000, "n": "1"}])
    else:
        path.write_bytes(long_row(name))
    (row,) = values(path)
    assert (len(row["prompt"].encode()), row["n"]) == (12_500_000 if name == "a.csv" else 10_000_000, "1")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("one.jsonl", b'{"a": 1}', [{"a": 1}]),
        ("one.json", b'{"a": 1}', [{"a": 1}]),
        ("one-over-lines.json", b'\n{"a":\n  [1,\n 2]}\n', [{"a": [1, 2]}]),
        ("one-indented.json", b'{\r\n  "a": {\r\n "b": 1}\r\n}\r\n', [{"a": {"b": 1}}]),
        ("null-fields.jsonl", b'{"a": null, "b": {"c": [null]}}', [{"a": None, "b": {"c": [None]}}]),
        ("no-objects.jsonl", b'[1]\n"text"\n3\nnull\n{}', [[1], "text", 3, None, {}]),
        ("no-objects.json", b'[[1], "text", 3, null, {}]', [[1], "text", 3, None, {}]),
        ("mixed-schemas.jsonl", b'{"a": 1}\n{"b": "x"}\n{"a": {}}', [{"a": 1}, {"b": "x"}, {"a": {}}]),
        ("mixed-schemas.json", b'[{"a": 1}, {"b": "x"}, {"a": {}}]', [{"a": 1}, {"b": "x"}, {"a": {}}]),
        ("words.jsonl", b'{"NaN": "Infinity -Infinity \\" NaN"}', [{"NaN": 'Infinity -Infinity " NaN'}]),
        ("lone-surrogate.jsonl", b'{"a": "\\ud83d"}', [{"a": "\ud83d"}]),
        ("lone-surrogate.json", b'[{"a": "\\udc80"}]', [{"a": "\udc80"}]),  # the mark of a bad byte, but written so
        ("same-key-apart.jsonl", b'{"a": {"x": 1}, "b": {"x": 1}}', [{"a": {"x": 1}, "b": {"x": 1}}]),
        ("escaped-null.jsonl", b'{"a": "\\u0000"}', [{"a": "\0"}]),
        ("separators.jsonl", '{"a": "\u2028\x85"}'.encode(), [{"a": "\u2028\x85"}]),
        ("windows.csv", b'a,b\r\n1,"x\r\ny"\r\n', [{"a": "1", "b": "x\r\ny"}]),
        ("old-mac.csv", b"a,b\r1,2\r3,4\r", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        ("quotes.csv", b'prompt,completion\n"a\n""b""",\n', [{"prompt": 'a\n"b"', "completion": ""}]),
        ("spaces.csv", b"prompt , completion\na, b\n", [{"prompt": "a", "completion": " b"}]),
        ("index.csv", b",prompt\n0,a\n", [{"": "0", "prompt": "a"}]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_odd_and_right_is_passed_on(name: str, content: bytes, expected: list[Any], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert values(tmp_path / name) == expected


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_nan_of_a_data_frame_is_a_missing_value(name: str, tmp_path: Path) -> None:
    """Where a text is expected it is refused like a null, and where nobody looks it disturbs nobody."""
    rows = [{"prompt": "x", "completion": NAN, "score": 0.5, "more": [{"weight": NAN}]}]
    (write_parquet if name == "a.parquet" else write_stream)(tmp_path / name, rows)
    assert values(tmp_path / name) == [{"prompt": "x", "completion": None, "score": 0.5, "more": [{}]}]


# ---------------------------------------------------------------------------------------------------- broken rows


@pytest.mark.parametrize(
    ("name", "content", "number", "problem"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n{"a": 3}', 2, "broken JSON (Expecting ',' delimiter at column"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": 3', 3, "broken JSON (Expecting ',' delimiter at column 8)"),
        ("a.jsonl", b'{"a": 1}\n{"a": "b', 2, "broken JSON (Unterminated string starting at column 7)"),
        ("a.jsonl", b'{"a": 1}\n{"a": NaN}', 2, "broken JSON (NaN is no JSON at column 7)"),
        ("a.jsonl", b'{"a": 1}\n{"NaN \\"": "NaN", "b": [{"c": NaN}]}', 2, "broken JSON (NaN is no JSON at column 31)"),
        ("a.jsonl", b'{"a": 1}\n{"a": -Infinity}', 2, "broken JSON (-Infinity is no JSON at column 7)"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2} {"a": 3}', 2, "broken JSON (Extra data at column 10)"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2}\r{"a": 3}', 2, "broken JSON (Extra data"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2},\n{"a": 3}', 2, "broken JSON (Extra data at column 9)"),
        ("a.jsonl", b"{\"a\": 1}\n{'a': 2}", 2, "broken JSON (Expecting property name"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xfc"}', 3, "not UTF-8 (invalid start byte at byte 8 of the line)"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xed\xa0\x80"}', 2, "not UTF-8"),  # a surrogate in bytes
        ("a.jsonl", b'{"a": 1}\n{"a": "b\0c"}', 2, "broken JSON (Invalid control character at column 9)"),
        ("a.jsonl", b'{"a": 1}\n\0\0\0\0', 2, "broken JSON (Expecting value at column 1)"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, 2, "broken JSON"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b"]" * 100_000, 2, "broken JSON (nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}", 2, "broken JSON (Exceeds the limit (4300 digits)"),
        ("a.jsonl", b'{"a": 1}\n{"prompt": "x", "prompt": "y"}', 2, 'key "prompt" stands twice'),
        ("a.jsonl", b'{"a": 1}\n{"m": [{"role": 1, "x": 2, "role": 1}]}', 2, 'key "role" stands twice'),
        ("a.jsonl.gz", _gzip(b'{"a": 1}\n{"a": 2\n{"a": 3}'), 2, "broken JSON"),
        ("a.json", b'[{"a": "ok"},\n{"a": "\xfc"}, {"a": "ok"}]', 2, "not UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a": NaN}]', 2, "broken JSON (NaN is no JSON at line 2, column 7)"),
        ("a.json", b'[{"a": "NaN"},\n{"a": NaN}, {}]', 2, "broken JSON (NaN is no JSON at line 2, column 7)"),
        ("a.json", b'[{"a": 1}, {"a": 1, "a": 2}, {}]', 2, 'key "a" stands twice'),
        ("lines.json", b'{"a": 1}\n{"a": 2\n{"a": 3}', 2, "broken JSON"),
        ("lines.json", b'{"a": [1, 2],}\n{"a": 2}\n{"a": 3}', 1, "broken JSON"),
        ("lines.json", b'{"a": "\xfc"}\n{"a": 2}\n', 1, "not UTF-8"),
        ("lines.json", b'{"a": NaN}\n{"a": 2}\n', 1, "broken JSON (NaN is no JSON at column 7)"),
        ("lines.json", b'{"a": 1}\n[{"a": 2}, {"a": 3}\n', 2, "broken JSON"),
        ("a.csv", b"prompt,completion\n" + b"a,b\n" * 5000 + b"\xfc,b\n", 5001, "not UTF-8"),
        ("a.csv", b"prompt,completion\na,b\nc\nd,e\n", 2, "fewer cells than the header"),
        ("a.csv", b"prompt,completion\na,b\nc,d,e\n", 2, "more cells than the header"),
        ("a.csv", b"prompt,completion\na,b\nc,d\0\n", 2, "holds a null byte"),
        ("a.txt", b"one\ntw\xf6\nthree", 2, "not UTF-8 (invalid start byte at byte 3 of the line)"),
        ("a.txt", b"one\n\0\0\0\nthree", 2, "holds a null byte"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_broken_row_is_a_problem_of_that_row_alone(
    name: str, content: bytes, number: int, problem: str, tmp_path: Path
) -> None:
    """So that data.on_bad_row=skip can leave out this one and keep the others."""
    (tmp_path / name).write_bytes(content)
    rows = read(tmp_path / name)
    ((found, value, reason),) = [row for row in rows if row[2] is not None]
    assert (found, value) == (number, None)
    assert problem in str(reason)
    assert "\n" not in str(reason)
    assert any(row[2] is None for row in rows)


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_one_bad_text_in_a_column_is_a_problem_of_its_row(ending: str, tmp_path: Path) -> None:
    """Other writers may put any bytes into a text column."""
    texts = [f"text {i}".encode() for i in range(40)]
    texts[20] = b"M\xfcnchen"
    offsets = pyarrow.array([0, *(sum(map(len, texts[: i + 1])) for i in range(40))], pyarrow.int32())
    column = pyarrow.StringArray.from_buffers(40, offsets.buffers()[1], pyarrow.py_buffer(b"".join(texts)))
    table = pyarrow.table({"text": column})
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
    rows = read(tmp_path / f"a{ending}")
    assert [row[0] for row in rows if row[2]] == [21]
    assert "UTF8" in str(rows[20][2])
    assert [rows[19][1], rows[20][1], rows[21][1]] == [{"text": "text 19"}, None, {"text": "text 21"}]


# ------------------------------------------------------------------------------------------------ broken as a whole


def written(write: Callable[..., Any], *parts: Any) -> Callable[[Path], bytes]:
    """What a writer puts into a file, cut or changed."""

    def content(path: Path) -> bytes:
        write(path)
        data: bytes = path.read_bytes()
        for part in parts:
            data = part(data)
        return data

    return content


def many(path: Path) -> None:
    write_stream(path, [{"a": f"text {i}"} for i in range(100)], batch=20)


LONG_GZ = _gzip("".join(f'{{"a": "{hashlib.md5(bytes([i])).hexdigest()}"}}\n' for i in range(256)).encode())


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "holds no row"),
        ("a.jsonl", b"\xef\xbb\xbf", "holds no row"),
        ("a.jsonl", b" \n\n", "holds no row"),
        ("a.jsonl.gz", _gzip(b""), "holds no row"),
        ("a.json", b"", "holds no row"),
        ("a.json", b"\n \n", "holds no row"),
        ("a.json", b"[]", "holds no row"),
        ("a.json", b" [ ] ", "holds no row"),
        ("a.csv", b"", "holds no row"),
        ("a.csv", b"\n\n\n", "holds no row"),
        ("a.csv", b"prompt,completion\n", "holds no row"),
        ("a.txt", b"\n \r\n\t\n", "holds no row"),
        (
            "a.json",
            b'[{"a": 1},\n{"a": 2},\n{"a" 3}]',
            "row 3: broken JSON (Expecting ':' delimiter at line 3, column 6)",
        ),
        ("a.json", b'[{"a": "]"}, {"a": [1]}, {"a": }]', "row 3: broken JSON (Expecting value at line 1, column 32)"),
        ("a.json", b'[{"a": 1},\n{"a": 2},\n]', "row 3: broken JSON (Expecting value at line 3, column 1)"),
        ("a.json", b'[{"a": 1},,{"a": 2}]', "row 2: broken JSON (Expecting value at line 1, column 11)"),
        ("a.json", b'[{"a": 1}\n{"a": 2}]', "row 1: broken JSON (Expecting ',' or ']' at line 2, column 1)"),
        ("a.json", b'[{"a": 1}, {"a": 2}', "row 2: broken JSON (Expecting ',' or ']' at line 1, column 20)"),
        ("a.json", b'[{"a": 1}, ', "row 2: broken JSON (Expecting value at line 1, column 12)"),
        ("a.json", b"[", "row 1: broken JSON (Expecting value at line 1, column 2)"),
        ("a.json", b'[{"a": 1}] and more', "row 2: broken JSON (Extra data at line 1, column 12)"),
        ("a.json", b'[{"a": 1}]\n{"a": 2}\n[{"a": 3}]', "row 2: broken JSON (Extra data at line 2, column 1)"),
        ("a.json", b"[" * 100_000 + b"]" * 100_000, "row 1: broken JSON (nested too deeply"),
        (
            "a.json",
            b'{\n "a": 1,\n "b": [1, 2\n}\n',
            "row 1: broken JSON (Expecting ',' delimiter at line 4, column 1)",
        ),
        ("a.json", b'{\n "a": 1\n}\n{\n "a": 2\n}\n', "row 1: broken JSON (Extra data at line 4, column 1)"),
        ("a.csv", b'prompt,completion\na,b\n"c,d\n', "row 2: broken CSV (unexpected end of data, a quote is never"),
        ("a.csv", b'prompt,completion\na,b\n"c"x,d\n', "row 2: broken CSV (',' expected after '\"')"),
        ("a.csv", b'"prompt,completion\na,b\nc,d\n', "the header: broken CSV (unexpected end of data"),
        ("a.csv", b"prompt,prompt\na,b\n", "the header names a column twice (prompt, prompt)"),
        ("a.csv", b"prompt,,\na,b,c\n", "the header names a column twice (prompt, , )"),
        ("a.csv", b"\xfcber,prompt\na,b\n", "the header: not UTF-8"),
        ("a.jsonl", JSONL.encode("utf-16"), "is UTF-16 (allowed: UTF-8; `iconv -f UTF-16 -t UTF-8` converts it)"),
        ("a.jsonl", b"\xfe\xff" + JSONL.encode("utf-16-be"), "is UTF-16 (allowed"),
        ("a.jsonl", JSONL.encode("utf-16-le"), "is UTF-16-LE (allowed"),
        ("a.json", JSONL.encode("utf-16-be"), "is UTF-16-BE (allowed"),
        ("a.json", JSONL.encode("utf-32"), "is UTF-32 (allowed"),
        ("a.csv", "prompt,completion\na,b".encode("utf-16"), "is UTF-16 (allowed"),
        ("a.txt.gz", _gzip("hello".encode("utf-16")), "is UTF-16 (allowed"),
        ("a.jsonl", b"\0" * 4096, "begins with null bytes"),
        ("a.jsonl", _gzip(b'{"a": 1}'), "is packed with gzip (allowed: the same under the name a.jsonl.gz)"),
        ("a.jsonl.gz", b'{"a": 1}', "broken gzip (Not a gzipped file"),
        ("a.csv.gz", LONG_GZ[:7], "broken gzip (Compressed file ended before"),
        ("a.json.gz", LONG_GZ[:-4], "broken gzip (Compressed file ended before"),
        ("a.json.gz", LONG_GZ[:-8] + bytes(8), "broken gzip (CRC check failed"),
        ("a.jsonl.gz", LONG_GZ[:2000] + bytes(2000) + LONG_GZ[4000:], "broken gzip (Error -3 while decompressing"),
        ("a.jsonl.gz", LONG_GZ + b"no gzip", "row 257: broken gzip (Not a gzipped file"),
        ("a.parquet", b"", "broken Parquet"),
        ("a.parquet", b"PAR1 no more of it", "broken Parquet"),
        ("a.parquet", written(write_parquet, lambda data: data[:-20]), "broken Parquet (Parquet magic bytes not found"),
        ("a.parquet", written(write_parquet, lambda data: data[len(data) // 2 :]), "broken Parquet"),
        ("a.parquet", written(write_stream), "broken Parquet"),
        ("a.parquet", written(lambda path: write_parquet(path, [])), "holds no row"),
        ("a.parquet", written(write_parquet, lambda data: data.replace(b"prompt", b"pr\xf6mpt")), "broken Parquet"),
        ("a.arrow", b"", "broken Arrow"),
        ("a.arrow", b"hello, this is no table at all\n", "broken Arrow"),
        ("a.arrow", written(many, lambda data: data[:-8]), "row 101: broken Arrow (the stream has no end mark"),
        ("a.arrow", written(many, lambda data: data[:-30]), "row 81: broken Arrow"),
        ("a.arrow", written(many, lambda data: data[:100]), "broken Arrow"),
        ("a.arrow", written(write_arrow_file, lambda data: data[:-3]), "broken Arrow"),
        ("a.arrow", written(write_arrow_file, lambda data: data[:500]), "broken Arrow"),
        ("a.arrow", written(lambda path: write_stream(path, [])), "holds no row"),
    ],
    ids=lambda value: repr(value)[:40] if not callable(value) else "written",
)
def test_a_broken_file_is_refused_with_its_name_and_the_row(
    name: str, content: bytes | Callable[[Path], bytes], says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content(path) if callable(content) else content)
    with pytest.raises(PreflightError, match=re.escape(str(path))) as refused:
        read(path)
    (problem,) = refused.value.problems
    assert problem.startswith(f"{path}: ")
    assert says in problem
    assert "\n" not in problem


def test_a_truncated_gzip_file_gives_the_rows_before_and_tells_the_next(tmp_path: Path) -> None:
    """Half of a download trains on nothing unnoticed."""
    (tmp_path / "a.jsonl.gz").write_bytes(LONG_GZ[: len(LONG_GZ) // 2])
    rows = read_file(tmp_path / "a.jsonl.gz")
    got: list[int] = []
    with pytest.raises(PreflightError, match="broken gzip") as refused:
        got.extend(number for number, _, _ in rows)
    assert 0 < len(got) < 256
    assert f"row {len(got) + 1}: broken gzip" in str(refused.value)


def test_a_damaged_page_of_parquet_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, compression="none", use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"question 1", b"question 7"))
    with pytest.raises(PreflightError, match=r"broken Parquet .*CRC"):
        read(path)


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_columns_of_one_name_are_refused(ending: str, tmp_path: Path) -> None:
    """A row as a mapping has room for one of them."""
    path = tmp_path / f"a{ending}"
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["prompt", "prompt"])
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(PreflightError, match=r"names a column twice \(prompt, prompt\)"):
        read(path)


@contextlib.contextmanager
def as_anyone() -> Iterator[None]:
    """With the rights of a user who is not root, whom no permission keeps out."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can look into, as root's own temporary ones are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.mark.parametrize("ending", KINDS.split(", "))
@pytest.mark.parametrize("what", ["none", "folder", "locked"])
def test_what_cannot_be_opened_is_told_alike_for_all_kinds(what: str, ending: str, open_folder: Path) -> None:
    path = open_folder / f"a{ending}"
    if what == "folder":
        path.mkdir()
    elif what == "locked":
        path.write_bytes(b"x")
        path.chmod(0)
    says = {"none": "No such file or directory", "folder": "Is a directory", "locked": "Permission denied"}[what]
    with as_anyone(), pytest.raises(PreflightError, match=re.escape(f"{path}: cannot be read ({says})")):
        read(path)


# --------------------------------------------------------------------------------------------------------- lazily


def endless(tmp_path: Path, name: str, rows: int) -> Path:
    """A file of rows of about 1 kB."""
    path = tmp_path / name
    cell = "x" * 1000
    if name == "a.parquet":
        write_parquet(path, [{"text": f"{i}{cell}"} for i in range(rows)], use_dictionary=False)
    elif name == "a.arrow":
        write_stream(path, [{"text": f"{i}{cell}"} for i in range(rows)], batch=rows)
    else:
        line: Callable[[int], str] = {
            "a.csv": lambda i: f"{i}{cell}\n" if i else "text\n",
            "a.txt": lambda i: f"{i}{cell}\n",
        }.get(name, lambda i: f'{{"text": "{i}{cell}"}}\n')
        with gzip.open(path, "wb", 1) if name.endswith(".gz") else open(path, "wb") as file:
            file.writelines(line(i).encode() for i in range(rows))
    return path


LAZY = ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow"]


def peaks(work: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that Python's objects, and Arrow's buffers, take while something runs."""
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    seen = 0
    for _ in work():
        seen = max(seen, pyarrow.total_allocated_bytes() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, seen


@pytest.mark.parametrize("name", LAZY)
def test_memory_does_not_grow_with_the_file(name: str, tmp_path: Path) -> None:
    """20 MB are read through while at most 1 MB of Python objects is alive: a batch of 16 rows, and buffers.

    Of Arrow's own buffers a Parquet column keeps the 1 MB that is read ahead and a page of 1 MB, packed and unpacked,
    and some more while pages change: 8 MB is far from the 20 MB of its one row group.
    """
    path = endless(tmp_path, name, 20_000)
    read_file(path).close()
    python, arrow = peaks(lambda: read_file(path))
    assert python < 1 << 20
    assert arrow < 8 << 20


@pytest.mark.parametrize("name", LAZY)
def test_a_reader_left_half_way_closes_its_file(name: str, tmp_path: Path) -> None:
    path = endless(tmp_path, name, 200)

    def is_open() -> bool:
        return str(path.resolve()) in [file.path for file in psutil.Process().open_files()]

    rows = read_file(path)
    assert next(rows)[0] == 1
    assert is_open()
    rows.close()
    assert not is_open()


def test_nothing_is_opened_before_the_first_row_is_asked_for(tmp_path: Path) -> None:
    rows = read_file(tmp_path / "not-yet.jsonl")
    (tmp_path / "not-yet.jsonl").write_text("{}")
    assert list(rows) == [(1, {}, None)]


# --------------------------------------------------------------------------------------------------------- places


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def names_of(folder: Path, files: list[Path]) -> list[str]:
    return [str(file.relative_to(folder)) for file in files]


def test_a_directory_is_all_its_files_in_order(tmp_path: Path) -> None:
    fill(tmp_path, "b.jsonl", "a.csv", "B.JSONL.GZ", "sub/deep/c.txt", "sub/a.parquet", "README.md", "x.tar.gz")
    fill(tmp_path, ".hidden.jsonl", ".git/config.json", "sub/.a.json", "dataset_info.json")
    expected = ["B.JSONL.GZ", "a.csv", "b.jsonl", "sub/a.parquet", "sub/deep/c.txt"]
    assert names_of(tmp_path, files_of(str(tmp_path))) == expected


def test_links_between_directories_are_followed_once(tmp_path: Path) -> None:
    fill(tmp_path, "data/a.jsonl", "store/b.jsonl")
    (tmp_path / "data" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "store")
    assert names_of(tmp_path, files_of(str(tmp_path / "data"))) == ["data/a.jsonl", "data/more/b.jsonl"]


def test_a_saved_data_set_is_its_data_alone(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    data = datasets.Dataset.from_list([{"text": f"{i}"} for i in range(10)])
    data.save_to_disk(saved, num_shards=3)
    datasets.load_from_disk(str(saved)).map(lambda row: {"text": row["text"] * 2})  # leaves cache-*.arrow there
    assert list(saved.glob("cache-*.arrow"))
    for path in (saved, tmp_path):
        assert [value["text"] for file in files_of(str(path)) for value in values(file)] == [f"{i}" for i in range(10)]


def test_splits_that_were_saved_together_are_not_mixed(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "saved")
    with pytest.raises(PreflightError, match=re.escape(f"(allowed: one of {tmp_path / 'saved' / 'train'}, ")):
        files_of(str(tmp_path / "saved"))
    assert names_of(tmp_path, files_of(str(tmp_path / "saved" / "train"))) == ["saved/train/data-00000-of-00001.arrow"]


def test_a_saved_data_set_without_its_list_of_files_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "state.json", "dataset_info.json", "data-00000-of-00001.arrow")
    with pytest.raises(PreflightError, match=r"state\.json: not as `datasets` saves it"):
        files_of(str(tmp_path))


def test_a_glob_is_its_files_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "shards/2.jsonl", "shards/1.jsonl", "shards/1.csv", "shards/.0.jsonl", "shards/sub/3.jsonl")
    monkeypatch.chdir(tmp_path)
    assert files_of("shards/*.jsonl") == [Path("shards/1.jsonl"), Path("shards/2.jsonl")]
    assert files_of("shards/[1-3].??*") == [Path("shards/1.csv"), Path("shards/1.jsonl"), Path("shards/2.jsonl")]
    assert len(files_of(f"{tmp_path}/**/*.jsonl")) == 3
    fill(tmp_path, "shards/what[1].jsonl")
    assert files_of("shards/what[1].jsonl") == [Path("shards/what[1].jsonl")]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("train.json", "train.json: no such file or directory; did you mean {0}/train.jsonl? (allowed: a file, a"),
        ("shard/1.jsonl", "shard/1.jsonl: no such file or directory; did you mean {0}/shards? (allowed"),
        ("train.jsonl/1.jsonl", "no such file or directory; did you mean {0}/train.jsonl? (allowed"),
        ("nothing-like-it", "nothing-like-it: no such file or directory (allowed"),
        ("empty", "empty: a directory without a file of a known kind (allowed: .jsonl, "),
        ("empty.jsonl", "empty.jsonl: a directory without a file of a known kind (allowed: .jsonl, "),
        ("shards/*.csv", "shards/*.csv: no file matches (allowed: .jsonl, "),
        ("shards*", "shards*: no file matches"),
        (
            "notes.jsonll",
            "notes.jsonll: no known kind of file; did you mean .jsonl? (allowed: .jsonl, .jsonl.gz, .json,",
        ),
        ("rows.tar.gz", "rows.tar.gz: no known kind of file (allowed"),
        ("plain", "plain: no known kind of file (allowed"),
        ("*.jsonll", "notes.jsonll: no known kind of file"),
    ],
)
def test_a_path_that_means_no_file_is_refused(path: str, says: str, tmp_path: Path) -> None:
    fill(tmp_path, "train.jsonl", "shards/1.jsonl", "notes.jsonll", "rows.tar.gz", "plain", "empty/notes.md")
    (tmp_path / "empty.jsonl").mkdir()
    with pytest.raises(PreflightError, match=re.escape(says.format(tmp_path))) as refused:
        files_of(str(tmp_path / path))
    assert str(refused.value).startswith(f"{tmp_path}/")
    assert len(refused.value.problems) == 1


def test_a_directory_that_may_not_be_listed_is_told(open_folder: Path) -> None:
    fill(open_folder, "locked/a.jsonl")
    locked = open_folder / "locked"
    locked.chmod(0)
    says = re.escape(f"{locked}: cannot be read (Permission denied)")
    with as_anyone(), pytest.raises(PreflightError, match=says):
        files_of(str(open_folder))
    locked.chmod(0o755)  # so that it can be removed


# -------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_is_of_the_bytes_the_order_and_where_files_end(tmp_path: Path) -> None:
    """A .txt of two lines and two of one line each, none ending in a newline, are other rows."""
    contents = {"ab": b"ab", "a": b"a", "b": b"b", "ab-again": b"ab"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    ab, a, b, again = (tmp_path / name for name in contents)
    assert fingerprint([ab]) == hashlib.sha256(b"ab").hexdigest() == fingerprint([again])
    assert len({fingerprint(paths) for paths in ([ab], [a, b], [b, a], [a], [])}) == 5
    with pytest.raises(PreflightError, match=re.escape(f"{tmp_path / 'none'}: cannot be read (No such file")):
        fingerprint([tmp_path / "none"])
