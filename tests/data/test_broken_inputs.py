"""Data as people have it: each broken or odd input is refused with file, row and reason, or stands in the preflight."""

from __future__ import annotations

import copy
import gzip
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sft_lab import config as configs
from sft_lab import preflight
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.errors import ConfigError, PreflightError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config
from tests.conftest import Cli

GOOD = [{"prompt": f"what is {i} plus {i}?", "completion": f"it is {i + i}"} for i in range(4)]
SKIP = "data.on_bad_row=skip"
Write = Callable[[Path], None]
Content = list[Any] | bytes | Write


@lru_cache(maxsize=64)
def composed(*overrides: str) -> Config:
    words = ["model=tiny_llama", "tracking=none", "data=from_file", "data.path=rows.jsonl", *overrides]
    return configs.to_config(configs.compose(words))


def written(folder: Path, name: str, content: Content) -> Path:
    """Rows are written as JSON, one a line; a str among them is a line as it is."""
    path = folder / name
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in content))
    return path


def examined(path: Path, *overrides: str) -> tuple[Prepared, dict[str, Any]]:
    """What is prepared, and what preflight.json would hold."""
    config = copy.deepcopy(composed(*(word.replace("FOLDER", str(path.parent)) for word in overrides)))
    config.data.path = str(path)
    data = prepare(config)
    return data, preflight.examine(config, data, RunDirectory(path.parent / "run")).as_dict()


def problems_of(path: Path, *overrides: str) -> list[str]:
    """Anything else than a PreflightError would be a traceback at the terminal."""
    with pytest.raises(PreflightError) as error:
        examined(path, *overrides)
    assert error.value.exit_code == 2
    return error.value.problems


def rows_of(report: dict[str, Any], name: str) -> list[str]:
    (finding,) = [finding for finding in report["findings"] if finding["name"] == name]
    return finding["rows"]


def numbers(data: Prepared) -> list[int]:
    return [row["number"] for row in data.train]


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    """Turns such as "user: hello"."""
    split = [turn.partition(": ") for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, _, content in split], **more}


def tokens(ids: list[Any], **more: Any) -> dict[str, Any]:
    return {"input_ids": ids, **more}


def called(**call: Any) -> dict[str, Any]:
    """A row in which the assistant calls a tool."""
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "time?"}, message]}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# ------------------------------------------------------------------------------------------------------ single rows

HI = chat("user: hi", "assistant: hello")
CLOCK = {"type": "function", "function": {"name": "clock", "arguments": {}}}

# A row between two good ones, the reason for which it is refused, and overrides.
BAD_ROWS: dict[str, tuple[Any, str, list[str]]] = {
    # what is no JSON
    "broken JSON": ('{"prompt": "a", "completion": }', r"broken JSON \(.*column 31\)", []),
    "a line cut off": ('{"prompt": "a", "compl', r"broken JSON \(", []),
    "two objects on a line": ('{"prompt": "a", "completion": "b"} {}', r"broken JSON \(Extra data", []),
    "NaN": ('{"prompt": NaN, "completion": "b"}', r"NaN is no JSON at column 12", []),
    "Infinity": ('{"prompt": "a", "completion": -Infinity}', "-Infinity is no JSON", []),
    "a key twice": ('{"prompt": "a", "prompt": "b", "completion": "c"}', 'key "prompt" stands twice', []),
    "a key twice, nested": (
        '{"messages": [{"role": "user", "role": "assistant", "content": "b"}]}',
        'key "role" stands twice',
        [],
    ),
    "a null byte": ('{"prompt": "a\0b", "completion": "c"}', r"broken JSON \(Invalid control character", []),
    "nested without end": (f'{{"prompt": {nested(100_000)}}}', "nested too deeply", []),
    "a number of 5000 digits": (f'{{"prompt": {"9" * 5000}}}', r"broken JSON \(Exceeds", []),
    # wrong types at each level
    "a row that is a list": ([1], "a list where an object was expected", []),
    "a row that is a text": ('"hello"', "a text where an object was expected", []),
    "a row that is null": ("null", "a null where an object was expected", []),
    "a null field": ({"prompt": None, "completion": "b"}, "prompt is null and completion is text", []),
    "a number for a text": ({"question": "a", "answer": 4}, "answer is int where a text was expected", []),
    "no known columns": ({"title": "a", "body": "b"}, "columns title, body fit no format", []),
    "a column mistyped": ({"promt": "a", "completion": "b"}, "did you mean 'prompt'", []),
    "an empty object": ({}, r"columns \(none\) fit no format", []),
    "messages that are an object": ({"messages": {}}, "messages is object where a list was expected", []),
    "messages that are words": ({"messages": "hello"}, "messages is a text that is no JSON", []),
    "no messages": ({"messages": []}, "messages is empty", []),
    "a message that is null": ({"messages": [None, *HI["messages"]]}, "message 1 is null where an object", []),
    "a message that is a text": ({"messages": ["hi", *HI["messages"]]}, "message 1 is text where an object", []),
    "a content that is null": (
        {"messages": [{"role": "user", "content": None}, HI["messages"][1]]},
        "message 1: content is null where a text was expected",
        [],
    ),
    "a content that is a number": (
        {"messages": [{"role": "user", "content": 3}, HI["messages"][1]]},
        "message 1: content is int where a text was expected",
        [],
    ),
    "a content with a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, HI["messages"][1]]},
        r"message 1: content part 1 has type 'image' \(allowed: text, ",
        [],
    ),
    "a message without a role": (
        {"messages": [{"content": "hi"}, HI["messages"][1]]},
        r"message 1 has no 'role' \(it has content",
        [],
    ),
    "a role that is a number": (
        {"messages": [{"role": 1, "content": "a"}]},
        r"message 1 has role 1 \(allowed: system, user",
        [],
    ),
    # order and roles
    "an unknown role": (chat("user: hi", "assistnat: hello"), "did you mean 'assistant'", []),
    "an unknown role in sharegpt": (
        {"conversations": [{"from": "alice", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        r"message 1 has from 'alice' \(allowed: human",
        [],
    ),
    "system in the middle": (chat("user: hi", "system: be kind", "assistant: hello"), "message 2 is a system mess", []),
    "system twice": (chat("system: a", "system: b", "user: hi", "assistant: hello"), "message 2 is a system mess", []),
    "two system prompts": (
        {"conversations": [{"from": "system", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
        "the column system has another one",
        [],
    ),
    "a tool before the assistant": (chat("user: hi", "tool: 3", "assistant: hello"), "message 2 is a tool's and", []),
    "nobody answers": (chat("user: hi", "user: hello?"), "no assistant turn, so there is nothing to learn", []),
    "nothing but a system prompt": (chat("system: be kind"), "no assistant turn", []),
    # weights
    "a weight of 2": ({**GOOD[2], "weight": 2}, r"weight is 2 \(allowed: 0, .* and 1\)", []),
    "a weight of -1": ({**GOOD[2], "weight": -1}, "weight is -1", []),
    "a weight in words": ({**GOOD[2], "weight": "half"}, "weight is 'half'", []),
    "a message's weight of 0.5": (
        {"messages": [HI["messages"][0], {**HI["messages"][1], "weight": 0.5}]},
        r"message 2 has weight 0.5 \(allowed: 0, 1\)",
        [],
    ),
    "only answers of weight 0": (
        {"messages": [HI["messages"][0], {**HI["messages"][1], "weight": 0}]},
        "no assistant turn with weight 1",
        [],
    ),
    "weight and train that disagree": (
        {"messages": [HI["messages"][0], {**HI["messages"][1], "weight": 0, "train": True}]},
        "contradict each other",
        [],
    ),
    # tools
    "a call that the template does not write": (called(**CLOCK), r"writes no tool calls \(chat_template=qwen", []),
    "tools that the template does not write": ({**HI, "tools": [CLOCK]}, "writes no tool definitions", []),
    "tools that are a number": ({**HI, "tools": 3}, "tools is int where a list was expected", []),
    "a tool without a name": ({**HI, "tools": [{"function": {"nmae": "f"}}]}, "tool 1 has no name .*it has nmae", []),
    "a call without arguments": (called(function={"name": "f"}), "tool call 1 has no 'arguments'", []),
    "arguments that are no JSON": (
        called(function={"name": "f", "arguments": "{a: 1}"}),
        "arguments is a text that is no JSON",
        ["chat_template=qwen"],
    ),
    "arguments that are a list": (
        called(function={"name": "f", "arguments": [1]}),
        "arguments is list where an object",
        ["chat_template=qwen"],
    ),
    "a call of the user's": (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [CLOCK]}, HI["messages"][1]]},
        r"message 1 has tool_calls \(allowed: on an assistant's\)",
        [],
    ),
    # tokens
    "labels of another length": (tokens([5, 6, 7], labels=[5, 6]), "labels has 2 entries where a list of 3", []),
    "labels that are others": (tokens([5, 6], labels=[5, 9]), r"labels\[1\] is 9 where input_ids\[1\] is 6", []),
    "labels that are all -100": (tokens([5, 6], labels=[-100, -100]), "every label is -100", []),
    "a label on the first token alone": (tokens([5, 6], labels=[5, -100]), "no token of it carries loss", []),
    "a token beyond the vocabulary": (tokens([5, 1000]), r"token 1000 is none of .* \(allowed: 0 to \d+\)", []),
    "a token of 70 bits": (tokens([5, 2**70]), r"input_ids\[1\] is 11805916", []),
    "a token below 0": (tokens([5, -1]), r"input_ids\[1\] is -1", []),
    "a token that is a text": (tokens([5, "a"]), r"input_ids\[1\] is 'a'", []),
    "a token that is true": (tokens([5, True]), r"input_ids\[1\] is True", []),
    "no tokens": (tokens([]), "input_ids is empty", []),
    "padded tokens": (tokens([5, 6, 0], attention_mask=[1, 1, 0]), "attention_mask has a 0", []),
    "a mask of 2": (tokens([5, 6], completion_mask=[0, 2]), r"completion_mask\[1\] is 2 \(allowed: 0, 1\)", []),
    # texts
    "half a surrogate pair": ({"prompt": "\ud83d", "completion": "b"}, "half of a surrogate pair", []),
    "half a surrogate pair in the answer": ({"prompt": "a", "completion": "b\udc00"}, "half of a surrogate pair", []),
    "a blank text": ({"text": " \n\t "}, "text is blank", []),
    "a text without turns": ({"text": "hello"}, "has no turns to learn with loss=completion", ["data.loss=completion"]),
    # columns
    "a mapped column that is missing": (
        {"q": "a", "answer": "b"},
        r"no column 'question', which columns maps to 'prompt' \(the row has q, answer",
        ["data.columns={prompt: question, completion: answer}", "data.format=prompt_completion"],
    ),
    "a path into a list that is too short": (
        {"question": [], "answer": "b"},
        r"no column 'question.0'",
        ["data.columns={prompt: question.0, completion: answer}"],
    ),
    "another format than was said": (HI, "no column 'instruction'", ["data.format=alpaca"]),
}


def neighbours(overrides: list[str]) -> list[Any]:
    """Two good rows under these overrides."""
    text = " ".join(overrides)
    if "question.0" in text:
        return [{"question": [f"q{i}"], "answer": f"a{i}"} for i in range(2)]
    if "prompt: question" in text:
        return [{"question": f"q{i}", "answer": f"a{i}"} for i in range(2)]
    if "alpaca" in text:
        return [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(2)]
    return GOOD[:2]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_refused_or_left_out_on_record(name: str, tmp_path: Path) -> None:
    bad, reason, overrides = BAD_ROWS[name]
    first, last = neighbours(overrides)
    path = written(tmp_path, "rows.jsonl", [first, bad, last])
    (problem,) = problems_of(path, *overrides)
    assert problem.startswith(f"{path}: row 2: ")
    assert re.search(reason, problem)
    data, report = examined(path, *overrides, SKIP)
    assert numbers(data) == [1, 3]
    assert report["ok"]
    assert report["rows"] == {"read": 3, "kept": 2, "dropped": {"bad": 1}}
    (left_out,) = rows_of(report, "dropped_bad")
    assert left_out.startswith(f"{path}:2: ")
    assert re.search(reason, left_out)


# ------------------------------------------------------------------------------------------------------- whole files


def latin_1_line(path: Path) -> None:
    row = {"prompt": "café", "completion": "crème"}
    lines = [json.dumps(GOOD[0]).encode(), json.dumps(row, ensure_ascii=False).encode("latin-1")]
    path.write_bytes(b"\n".join([*lines, json.dumps(GOOD[1]).encode()]))


def gzipped(rows: list[Any], share: float = 1.0) -> bytes:
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
    return packed[: round(share * len(packed))]


def parquet(rows: list[Any], share: float = 1.0) -> Write:
    def write(path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        path.write_bytes(path.read_bytes()[: round(share * path.stat().st_size)])

    return write


def arrow(rows: list[Any], cut: int) -> Write:
    """The stream form, one row a batch, without its last bytes."""

    def write(path: Path) -> None:
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        path.write_bytes(path.read_bytes()[:-cut])

    return write


def directory(**files: Content) -> Write:
    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            written(path, name.replace("__", "."), content)

    return write


MANY = [{"prompt": f"question {i * 7919}", "completion": f"answer {i * 104729}"} for i in range(2000)]

# The file's name, what is in it, and the only problem: what follows the file's name, as a pattern. No override helps.
BROKEN_FILES: dict[str, tuple[str, Content, str]] = {
    "empty": ("rows.jsonl", b"", ": holds no row"),
    "blank lines": ("rows.jsonl", b"\n   \n\r\n\t\n", ": holds no row"),
    "nothing but a byte order mark": ("rows.jsonl", b"\xef\xbb\xbf", ": holds no row"),
    "an empty array": ("rows.json", b"[]", ": holds no row"),
    "a header alone": ("rows.csv", b"prompt,completion\n", ": holds no row"),
    "UTF-16": ("rows.jsonl", json.dumps(GOOD[0]).encode("utf-16"), r": is UTF-16.* \(allowed: UTF-8; `iconv"),
    "UTF-32": ("rows.jsonl", json.dumps(GOOD[0]).encode("utf-32"), r": is UTF-32"),
    "null bytes": ("rows.jsonl", b"\0" * 512, ": begins with null bytes"),
    "an empty directory": ("rows", directory(), ": a directory without a file of a known kind"),
    "a directory of other files": ("rows", directory(README__md=b"x", x__py=b"y"), ": a directory without a file of a"),
    "an unknown kind": ("rows.jsnol", b"{}", ": no known kind of file; did you mean .json"),
    "gzip that is none": (
        "rows.jsonl.gz",
        b'{"prompt": "a", "completion": "b"}',
        r": broken gzip \(Not a gzipped file",
    ),
    "gzip under another name": ("rows.jsonl", gzipped(GOOD), ": is packed with gzip .*rows.jsonl.gz"),
    "gzip cut off": ("rows.jsonl.gz", gzipped(MANY, 0.5), r": row \d{3,}: broken gzip \(Compressed file ended"),
    "Parquet cut off": ("rows.parquet", parquet(GOOD, 0.7), r": broken Parquet \("),
    "Parquet that is none": ("rows.parquet", b"hello", r": broken Parquet \("),
    "Arrow cut off in a row": ("rows.arrow", arrow(GOOD, 30), r": row 4: broken Arrow \("),
    "Arrow without its end": ("rows.arrow", arrow(GOOD, 8), r": row 5: broken Arrow \(.*rows are missing"),
    "Arrow that is none": ("rows.arrow", b"hello", r": broken Arrow \("),
    "a column twice": ("rows.csv", b"prompt,prompt,completion\na,b,c\n", ": the header names a column twice"),
    "a quote that is never closed": (
        "rows.csv",
        b'prompt,completion\na,b\nc,"d\n',
        r": row 2: broken CSV \(.*never cl",
    ),
    "an array cut off": ("rows.json", json.dumps(GOOD)[:-30].encode(), r": row 4: broken JSON \("),
    "an array without a comma": (
        "rows.json",
        b'[{"text": "a"} {"text": "b"}]',
        r": row 1: broken JSON \(Expecting ','",
    ),
    "one broken file of two": (
        "rows",
        directory(a__jsonl=GOOD, b__parquet=b"hello"),
        r"/b.parquet: broken Parquet \(",
    ),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_broken_file_is_refused(name: str, on_bad_row: str, tmp_path: Path) -> None:
    """Leaving bad rows out must not turn half of a file into a whole one."""
    file, content, reason = BROKEN_FILES[name]
    path = written(tmp_path, file, content)
    (problem,) = problems_of(path, f"data.on_bad_row={on_bad_row}")
    assert problem.startswith(str(path))
    assert re.match(reason, problem.removeprefix(str(path)))


# The file's name, what is in it, and the bad ones among its rows.
BAD_IN_FILE: dict[str, tuple[str, Content, dict[int, str]]] = {
    "latin-1": ("rows.jsonl", latin_1_line, {2: r"not UTF-8 \(.* at byte 16 of the line\)"}),
    "latin-1 in an array": (
        "rows.json",
        b'[{"prompt": "a", "completion": "b"}, {"prompt": "caf\xe9", "completion": "b"}]',
        {2: "not UTF-8"},
    ),
    "latin-1 in CSV": ("rows.csv", b"question,answer\na,b\ncaf\xe9,b\n", {2: "not UTF-8"}),
    "too many and too few cells": (
        "rows.csv",
        b"question,answer\na,b\nc,d,e\nf\n\nc,d\n",
        {2: "more cells than the header", 3: "fewer cells than the header"},
    ),
    "a null byte in CSV": ("rows.csv", b"question,answer\na,b\nc\0,d\n", {2: "holds a null byte"}),
    "a null byte in text": ("rows.txt", b"hello there\nbad\0\ngood day\n", {2: "holds a null byte"}),
    "nulls in Parquet": (
        "rows.parquet",
        parquet([GOOD[0], {"prompt": None, "completion": "b"}, {"prompt": "c", "completion": None}]),
        {2: "prompt is null", 3: "completion is null"},
    ),
    "nested nulls in Parquet": (
        "rows.parquet",
        parquet([HI, {"messages": [None]}, chat("user: x", "assistant: y"), {"messages": None}]),
        {2: "message 1 is null", 4: "messages is null"},
    ),
    "NaN in Parquet": (
        "rows.parquet",
        parquet([{"text": "a", "weight": 1.0}, {"text": "b", "weight": float("nan")}, {"text": "c", "weight": 0.3}]),
        {3: "weight is 0.3"},
    ),
}


@pytest.mark.parametrize("name", BAD_IN_FILE)
def test_bad_rows_of_any_kind_of_file_are_told_by_number(name: str, tmp_path: Path) -> None:
    file, content, bad = BAD_IN_FILE[name]
    path = written(tmp_path, file, content)
    problems = problems_of(path)
    assert [problem.split(": ")[:2] for problem in problems] == [[str(path), f"row {number}"] for number in bad]
    assert all(re.search(reason, problem) for reason, problem in zip(bad.values(), problems, strict=True))
    data, report = examined(path, SKIP)
    assert not set(numbers(data)) & set(bad)
    assert report["rows"]["read"] == len(data.train) + len(bad)
    assert [id_.split(": ")[0] for id_ in rows_of(report, "dropped_bad")] == [f"{path}:{number}" for number in bad]


# ----------------------------------------------------------------------------------------------- odd, and yet trained


@dataclass
class Odd:
    """Rows that train although there is something about them, and the findings that say so.

    kept: numbers of the rows that train.  findings: name to the numbers (or ids) of the rows that show it.
    """

    content: Content
    kept: list[int]
    findings: dict[str, list[Any]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    name: str = "rows.jsonl"
    ok: bool = True


LONG = {"prompt": "short", "completion": "word " * 200}
LONG_CHAT = chat(*(f"{role}: {'word ' * 9}{i}" for i in range(4) for role in ("user", "assistant")))
CALLS = [CLOCK, {"type": "function", "function": {"name": "sum", "arguments": '{"a": [1, 2]}'}}]

ODD: dict[str, Odd] = {
    "one row": Odd(GOOD[:1], [1], {"rows": []}),
    "two users": Odd([GOOD[0], chat("user: a", "user: b", "assistant: c")], [1, 2], {"same_role_twice": [2]}),
    "assistant first": Odd(
        [GOOD[0], chat("assistant: a", "user: b", "assistant: c")], [1, 2], {"assistant_first": [2]}
    ),
    "a tool without a call": Odd(
        [chat("user: a", "assistant: b", "tool: 3", "assistant: c")], [1], {"tool_without_call": [1]}
    ),
    "user last": Odd([GOOD[0], chat("user: a", "assistant: b", "user: c")], [1, 2], {"ends_with_user": [2]}),
    "an empty answer": Odd([{"prompt": "a", "completion": ""}, GOOD[0]], [1, 2], {"empty_answer": [1]}),
    "a blank answer": Odd([{"prompt": "a", "completion": " \n"}, GOOD[0]], [1, 2], {"empty_answer": [1]}),
    "special tokens in the question": Odd(
        [{"prompt": "what is <|im_start|>?", "completion": "a token"}], [1], {"special_tokens_in_text": [1]}
    ),
    "an answer that ends its turn": Odd(
        [GOOD[0], {"prompt": "a", "completion": "b<|im_end|>"}],
        [1, 2],
        {"extra_eos": [2], "special_tokens_in_text": [2]},
        ok=False,
    ),
    "messages and alpaca in one file": Odd(
        [HI, {"instruction": "say", "input": "x", "output": "y"}, {"text": "z"}, {"question": "q", "answer": "a"}],
        [1, 2, 3, 4],
        {"text": [3]},
    ),
    "messages and alpaca in one table": Odd(
        parquet([{**HI, "instruction": None, "output": None}, {"messages": None, "instruction": "a", "output": "b"}]),
        [1, 2],
        {"rows": []},
        name="rows.parquet",
    ),
    "weight 0": Odd([GOOD[0], {**GOOD[1], "weight": 0}, GOOD[2]], [1, 3], {"dropped_weight_0": [2]}),
    "weights in CSV": Odd(
        b"question,answer,weight\na,b,1\nc,d,0\ne,f,\n", [1, 3], {"dropped_weight_0": [2]}, name="rows.csv"
    ),
    "long rows dropped": Odd([GOOD[0], LONG], [1], {"dropped_long": [2]}, ["trainer.max_length=64"]),
    "long rows cut": Odd(
        [GOOD[0], LONG], [1, 2], {"truncated": [2]}, ["trainer.max_length=64", "data.on_long_row=truncate"]
    ),
    "a long question cut": Odd(  # its answer lies behind the cut
        [GOOD[0], {"prompt": LONG["completion"], "completion": "b"}],
        [1],
        {"dropped_long": [2]},
        ["trainer.max_length=64", "data.on_long_row=truncate"],
    ),
    "a long question cut on the left": Odd(
        [GOOD[0], {"prompt": LONG["completion"], "completion": "b"}],
        [1, 2],
        {"truncated": [2]},
        ["trainer.max_length=64", "data.on_long_row=truncate", "data.truncation_side=left"],
    ),
    "long rows split": Odd(
        [GOOD[0], LONG_CHAT], [1, 2, 2, 2, 2], {"split": [2]}, ["trainer.max_length=128", "data.on_long_row=split"]
    ),
    "a long answer cannot be split": Odd(
        [GOOD[0], LONG], [1], {"dropped_long": [2]}, ["trainer.max_length=64", "data.on_long_row=split"]
    ),
    "long tokens cannot be split": Odd(
        [GOOD[0], tokens([5] * 100)], [1], {"dropped_long": [2]}, ["trainer.max_length=64", "data.on_long_row=split"]
    ),
    "all rows alike": Odd(
        [GOOD[0]] * 3, [1, 2, 3], {"duplicates_exact": ["{path}:2 repeats {path}:1", "{path}:3 repeats {path}:1"]}
    ),
    "all rows alike, one is left": Odd(
        [GOOD[0], {k: v.upper() for k, v in GOOD[0].items()}],
        [1],
        {"duplicates_exact": ["{path}:2 repeats {path}:1"], "dropped_duplicate": [2]},
        ["data.deduplicate=exact"],
    ),
    "held-out rows that all leak": Odd(
        GOOD[:3],
        [1, 2, 3],
        {"leak": [f"{{path}}:{n} gives away {{path}}:{n} (exact)" for n in (1, 2, 3)]},
        ["data.eval_path=FOLDER/rows.jsonl"],
        ok=False,
    ),
    "tokens without an end": Odd([tokens([5, 6, 7], labels=[-100, 6, 7])], [1], {"untrained_turn_end": [1]}, ok=False),
    "tokens with two beginnings": Odd([tokens([1, 1, 6, 2])], [1], {"double_bos": [1]}, ok=False),
    "tokens with two ends": Odd([tokens([1, 6, 2, 2])], [1], {"extra_eos": [1]}, ok=False),
}


@pytest.mark.parametrize("case", ODD)
def test_an_odd_row_trains_and_stands_in_the_report(case: str, tmp_path: Path) -> None:
    odd = ODD[case]
    path = written(tmp_path, odd.name, odd.content)
    data, report = examined(path, *odd.overrides)
    assert numbers(data) == odd.kept
    assert report["ok"] == odd.ok
    for name, rows in odd.findings.items():
        expected = [f"{path}:{row}" if isinstance(row, int) else row.format(path=path) for row in rows]
        assert rows_of(report, name) == expected
    told = {finding["name"] for finding in report["findings"] if finding["level"] in ("error", "warning")}
    assert told <= set(odd.findings), "something else was found, too"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mark.jsonl", b"\xef\xbb\xbf" + b"".join(json.dumps(row).encode() + b"\n" for row in GOOD)),
        ("windows.jsonl", b"\r\n".join(json.dumps(row).encode() for row in GOOD) + b"\r\n"),
        ("mark_and_windows.csv", b"\xef\xbb\xbfprompt,completion\r\n" + b"".join(
            f"{row['prompt']},{row['completion']}\r\n".encode() for row in GOOD
        )),
        ("blank_lines.jsonl", b"\n\n" + b"\n \n".join(json.dumps(row).encode() for row in GOOD)),
        ("packed.jsonl.gz", gzipped(GOOD)),
        ("table.parquet", parquet(GOOD)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_how_rows_are_written_changes_none_of_their_tokens(name: str, content: Content, tmp_path: Path) -> None:
    plain, _ = examined(written(tmp_path, "rows.jsonl", GOOD))
    odd, report = examined(written(tmp_path, name, content))
    assert [row["input_ids"] for row in odd.train] == [row["input_ids"] for row in plain.train]
    assert [finding["level"] for finding in report["findings"] if finding["level"] != "fact"] == []


@pytest.mark.slow  # 2.5 million tokens are looked at
def test_a_row_of_ten_megabytes_is_left_out_on_record(tmp_path: Path) -> None:
    huge = {"prompt": "a", "completion": "word and word " * 750_000}
    path = written(tmp_path, "rows.jsonl", [GOOD[0], huge, GOOD[1]])
    assert path.stat().st_size > 10e6
    data, report = examined(path)
    assert numbers(data) == [1, 3]
    assert rows_of(report, "dropped_long") == [f"{path}:2"]


@pytest.mark.parametrize("depth", [100, 300])
def test_nested_arguments_of_a_call_are_written_whole(depth: int, tmp_path: Path) -> None:
    call = called(function={"name": "f", "arguments": {"a": json.loads(nested(depth))}})
    data, report = examined(written(tmp_path, "rows.jsonl", [GOOD[0], call]), "chat_template=qwen")
    assert nested(depth) in data.tokenizer.decode(data.train[1]["input_ids"])
    assert report["ok"]


@pytest.mark.parametrize("depth", [600, 900])
def test_arguments_nested_deeper_than_a_template_can_write_are_a_bad_row(depth: int, tmp_path: Path) -> None:
    call = called(function={"name": "f", "arguments": {"a": nested(depth)}})
    line = json.dumps(call).replace(f'"{nested(depth)}"', nested(depth))
    path = written(tmp_path, "rows.jsonl", [GOOD[0], line])
    (problem,) = problems_of(path, "chat_template=qwen")
    assert problem.startswith(f"{path}: row 2: ")


def test_half_a_surrogate_pair_in_a_columns_name_is_left_out_on_record(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl", [GOOD[0], {"prompt\ud83d": "a"}, GOOD[1]])
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: row 2: columns prompt")
    data, report = examined(path, SKIP)
    assert numbers(data) == [1, 3]
    assert rows_of(report, "dropped_bad")[0].startswith(f"{path}:2: columns prompt")


def test_a_file_whose_name_is_no_utf8_trains(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    written(tmp_path / "rows", os.fsdecode(b"caf\xe9.jsonl"), GOOD)
    data, report = examined(tmp_path / "rows")
    assert numbers(data) == [1, 2, 3, 4]
    assert report["ok"]


# --------------------------------------------------------------------------------------------- nothing to train on


@pytest.mark.parametrize(
    ("rows", "overrides", "reason"),
    [
        ([{"x": 1}, {"x": 2}], [SKIP], r"no row is left to train on \({'bad': 2}\)"),
        ([{**row, "weight": 0} for row in GOOD], [], r"no row is left to train on \({'weight_0': 4}\)"),
        ([LONG] * 2, ["trainer.max_length=32"], r"no row is left to train on \({'long': 2}\)"),
        (GOOD, ["data.eval_path=FOLDER/rows.jsonl", "data.on_leak=drop"], r"no row is left .*\({'leak': 4}\)"),
        (GOOD, ["data.eval_rows=4"], r"data.eval_rows=4 : .*rows.jsonl has 4 rows, .* \(allowed: 0 to 3\)"),
        (GOOD, ["data.eval_rows=99"], r"data.eval_rows=99 : .*rows.jsonl has 4 rows"),
        (GOOD, ["data.eval_fraction=1"], r"data.eval_fraction=1 : .* none would be left to train on"),
        (GOOD[:1], ["data.eval_rows=1"], r"data.eval_rows=1 : .* \(allowed: 0 to 0\)"),
        (GOOD, ["data.train_rows=0"], "no row is left to train on"),
    ],
)
def test_nothing_left_is_told(rows: list[Any], overrides: list[str], reason: str, tmp_path: Path) -> None:
    (problem,) = problems_of(written(tmp_path, "rows.jsonl", rows), *overrides)
    assert re.search(reason, problem)


def test_a_long_row_under_error_is_refused_even_where_bad_rows_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl", [GOOD[0], LONG, GOOD[1]])
    (problem,) = problems_of(path, SKIP, "trainer.max_length=64", "data.on_long_row=error")
    assert re.fullmatch(rf"{re.escape(str(path))}: row 2: \d+ tokens, more than trainer.max_length=64", problem)


def test_a_column_that_no_format_has_is_told_once_and_not_of_each_row(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"promt.* no format has .*did you mean 'prompt'"):
        examined(written(tmp_path, "rows.jsonl", GOOD), "data.columns={promt: prompt}")


def test_a_bad_held_out_row_is_refused_by_its_own_file_or_left_out_on_record(tmp_path: Path) -> None:
    held_out = written(tmp_path, "eval.txt", b"fine\nbad\0\n")
    path = written(tmp_path, "rows.jsonl", GOOD[:2])
    (problem,) = problems_of(path, "data.eval_path=FOLDER/eval.txt")
    assert problem.startswith(f"{held_out}: row 2: holds a null byte")
    data, report = examined(path, "data.eval_path=FOLDER/eval.txt", SKIP)
    assert (len(data.train), report["eval_rows"]) == (2, 1)
    assert rows_of(report, "dropped_eval_bad") == [f"{held_out}:2: holds a null byte"]


# -------------------------------------------------------------------------------------------------- the command line

TYPED: dict[str, tuple[str, Content, str]] = {
    "bad rows": (
        "rows.jsonl",
        [GOOD[0], chat("user: hi"), GOOD[1], '{"prompt"'],
        "rows.jsonl: row 2: no assistant turn",
    ),
    "UTF-16": ("rows.jsonl", json.dumps(GOOD[0]).encode("utf-16"), "rows.jsonl: is UTF-16"),
    "a gzip file cut off": ("rows.jsonl.gz", gzipped(MANY, 0.5), "rows.jsonl.gz: row "),
    "an empty directory": ("rows", directory(), "rows: a directory without a file of a known kind"),
    "rows whose end is not learned": ("rows.jsonl", [tokens([5, 6, 7], labels=[-100, 6, 7])], "untrained_turn_end"),
}


QUICK = ("bad rows", "rows whose end is not learned")  # the others take the same way


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TYPED]
)
def test_plan_and_training_refuse_alike_and_leave_nothing_behind(name: str, main: Cli, tmp_path: Path) -> None:
    file, content, said = TYPED[name]
    written(tmp_path, file, content)
    words = ["model=tiny_llama", "tracking=none", "trainer.max_steps=1", "data=from_file", f"data.path={file}"]
    for command in (["plan"], []):
        done = main(*command, *words)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert said in done.stdout + done.stderr
        assert [path.name for path in tmp_path.iterdir()] == [file]
