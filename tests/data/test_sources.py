"""Files as people have them: every kind, and every way in which one can be broken."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sft_lab.data.sources import RawRow, fingerprint, read, read_file
from sft_lab.errors import PreflightError
from sft_lab.schema import DataConfig

ROWS = [{"prompt": f"question {i} ü🙂", "completion": f"line\nnext {i}"} for i in range(3)]
LINES = [json.dumps(row, ensure_ascii=i != 1) for i, row in enumerate(ROWS)]


def write_csv(path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS: dict[str, Any] = {
    "rows.jsonl": lambda path: path.write_text("\n".join(LINES), encoding="utf-8"),
    "ends-with-newline.jsonl": lambda path: path.write_text("\n".join(LINES) + "\n", encoding="utf-8"),
    "byte-order-mark.jsonl": lambda path: path.write_text("\n".join(LINES), encoding="utf-8-sig"),
    "windows.jsonl": lambda path: path.write_bytes("\r\n".join(LINES).encode("utf-8-sig")),
    "UPPER.JSONL": lambda path: path.write_text("\n".join(LINES), encoding="utf-8"),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8"),
    "byte-order-mark.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    "lines.json": lambda path: path.write_text("\n".join(LINES), encoding="utf-8"),
    "rows.csv": write_csv,
    "byte-order-mark.csv": lambda path: (write_csv(path), path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())),
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_gives_the_same_numbered_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    rows = read_file(str(path))
    assert rows == [RawRow(str(path), number, row) for number, row in enumerate(ROWS, start=1)]
    assert [row.id for row in rows] == [f"{path}:{number}" for number in (1, 2, 3)]


def test_the_fingerprint_is_of_the_rows_and_not_of_the_file(tmp_path: Path) -> None:
    prints = set()
    for name, write in WRITERS.items():
        write(tmp_path / name)
        prints.add(fingerprint(DataConfig(), read_file(str(tmp_path / name))))
    assert len(prints) == 1
    assert fingerprint(DataConfig(), [RawRow("x", 1, ROWS[1])]) not in prints


def test_rows_of_jsonl_are_numbered_by_line(tmp_path: Path) -> None:
    """An editor must find the row where the message says it is."""
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{LINES[0]}\n   \n\r\n{LINES[1]}\n\n", encoding="utf-8")
    assert [(row.number, row.value) for row in read_file(str(path))] == [(2, ROWS[0]), (5, ROWS[1])]


def test_parquet_keeps_nested_messages(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
    assert [r.value for r in read_file(str(tmp_path / "rows.parquet"))] == [row]


# --------------------------------------------------------------------------------------------------- broken rows


@pytest.mark.parametrize(
    ("name", "content", "number", "problem"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n{"a": 3}', 2, "broken JSON (Expecting ',' delimiter at column"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": 3', 3, "broken JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": NaN}', 2, "broken JSON (NaN is no JSON at column 7"),
        ("a.jsonl", b'{"a": 1}\n{"a": -Infinity}', 2, "broken JSON (-Infinity is no JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": 2} {"a": 3}', 2, "broken JSON (Extra data"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": "\xfc"}', 3, "not UTF-8 (invalid start byte at byte 8 of the line"),
        ("a.jsonl", b'{"a": 1}\n' + b"[" * 100_000, 2, "broken JSON"),
        ("a.json", b'[{"a": "ok"},\n{"a": "\xfc"}, {"a": "ok"}]', 2, "not UTF-8"),
        ("a.csv", b"prompt,completion\n" + b"a,b\n" * 5000 + b"\xfc,b\n", 5001, "not UTF-8"),
        ("lines.json", b'{"a": 1}\n{"a": 2\n{"a": 3}', 2, "broken JSON"),
        ("lines.json", b'{"a": [1, 2],}\n{"a": 2}\n{"a": 3}', 1, "broken JSON"),
        ("a.csv", b"prompt,completion\na,b\nc\nd,e\n", 2, "fewer cells than the header"),
        ("a.csv", b"prompt,completion\na,b\nc,d,e\n", 2, "more cells than the header"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_broken_row_is_a_problem_of_that_row_alone(
    name: str, content: bytes, number: int, problem: str, tmp_path: Path
) -> None:
    """So that data.on_bad_row=skip can leave out this one and keep the others."""
    (tmp_path / name).write_bytes(content)
    rows = read_file(str(tmp_path / name))
    assert {row.number for row in rows if row.problem} == {number}
    assert problem in next(row.problem for row in rows if row.number == number)
    assert any(row.problem is None for row in rows)


def test_csv_cells_may_hold_lines_quotes_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"a\n""b""",\n', encoding="utf-8")
    (row,) = read_file(str(tmp_path / "a.csv"))
    assert (row.value, row.problem) == ({"prompt": 'a\n"b"', "completion": ""}, None)


# --------------------------------------------------------------------------------------------- broken as a whole


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "holds no row"),
        ("a.jsonl", b"\xef\xbb\xbf", "holds no row"),
        ("a.jsonl", b" \n\n", "holds no row"),
        ("a.json", b"", "holds no row"),
        ("a.json", b"[]", "holds no row"),
        ("a.csv", b"", "holds no row"),
        ("a.csv", b"prompt,completion\n", "holds no row"),
        (
            "a.json",
            b'[{"a": 1},\n{"a": 2},\n{"a" 3}]',
            "row 3: broken JSON (Expecting ':' delimiter at line 3, column 6)",
        ),
        ("a.json", b'[{"a": "]"}, {"a": [1]}, {"a": }]', "row 3: broken JSON (Expecting value at line 1, column 32)"),
        ("a.json", b'[{"a": 1},\n{"a": NaN}]', "row 2: broken JSON (NaN is no JSON at line 2, column 7)"),
        ("a.json", b'[{"a": "NaN"},\n{"a": NaN}]', "row 2: broken JSON (NaN is no JSON at line 2, column 7)"),
        ("a.csv", b'prompt,completion\na,b\n"c,d\n', "row 2: broken CSV (unexpected end of data)"),
        ("a.csv", b'prompt,completion\na,b\n"c"x,d\n', "row 2: broken CSV"),
        ("a.csv", b"prompt,prompt\na,b\n", "prompt"),
        ("a.parquet", b"", "broken Parquet"),
        ("a.parquet", b"PAR1 no more of it", "broken Parquet"),
        ("a.txt", b"hello", "no known kind of file (allowed: .jsonl, .json, .csv, .parquet)"),
        ("a", b"hello", "no known kind of file"),
        ("a.jsonl.gz", b"hello", "no known kind of file"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_broken_file_is_refused_with_its_name_and_the_row(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(PreflightError, match=re.escape(str(path))) as refused:
        read_file(str(path))
    (problem,) = refused.value.problems
    assert problem.startswith(f"{path}: ")
    assert says in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("name", "says"), [("folder", "no known kind"), ("folder.jsonl", "Is a directory"), ("none.jsonl", "No such file")]
)
def test_what_is_no_file_is_refused(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(PreflightError, match=says) as refused:
        read_file(str(tmp_path / name))
    assert str(refused.value).startswith(f"{tmp_path / name}: ")


def test_held_out_rows_come_from_eval_path(tmp_path: Path) -> None:
    for name, lines in (("train.jsonl", LINES[:2]), ("eval.jsonl", LINES[2:])):
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    data = DataConfig(path=str(tmp_path / "train.jsonl"), eval_path=str(tmp_path / "eval.jsonl"))
    train, held_out = read(data, seed=0)
    assert [[row.value for row in rows] for rows in (train, held_out)] == [ROWS[:2], ROWS[2:]]
