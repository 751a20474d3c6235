"""From rows of any format to chat messages, and why a row is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sft_lab.data.formats import FORMATS, RowError, detect, to_messages

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        (
            "messages",
            {"messages": '[{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]'},
            None,
        ),
        ("messages", {"messages": [{**USER, "name": "Ann", "weight": 1}, ASSISTANT], "id": 7}, None),
        ("messages", {"messages": [USER, ASSISTANT], "prompt": "other", "completion": "other"}, None),
        ("prompt_completion", {"prompt": "2 + 2?", "completion": "4"}, None),
        ("prompt_completion", {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ("alpaca", {"instruction": "2 + 2?", "output": "4"}, None),
        ("alpaca", {"instruction": "2 + 2?", "input": "", "output": "4"}, None),
        ("alpaca", {"instruction": "2 + 2?", "input": None, "output": "4"}, None),
        (
            "alpaca",
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            [{"role": "user", "content": "Add.\n\n2, 2"}, ASSISTANT],
        ),
        ("alpaca", {"system": "Be brief.", "instruction": "2 + 2?", "output": "4"}, [SYSTEM, USER, ASSISTANT]),
    ],
)
def test_rows_become_messages(name: str, row: dict[str, Any], messages: list[dict[str, str]] | None) -> None:
    """By the columns, and by the format's name; `None` stands for the one question and answer."""
    assert detect(row) == name
    assert to_messages(row) == to_messages(row, name) == (messages or [USER, ASSISTANT])


def test_every_format_is_tried_above() -> None:
    assert set(FORMATS) == {"messages", "prompt_completion", "alpaca"}


def test_an_empty_answer_and_a_last_turn_of_the_user_are_kept() -> None:
    messages = [USER, {"role": "assistant", "content": ""}, USER]
    assert to_messages({"messages": messages}) == messages


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([USER], "a list where an object was expected"),
        (None, "a null where an object was expected"),
        ("text", "a text where an object was expected"),
        ({}, "columns (none) fit no format (messages: messages; prompt_completion: prompt, completion; alpaca: "),
        ({"question": "a", "answer": "b"}, "columns question, answer fit no format"),
        ({"prompt": "a"}, "columns prompt fit no format"),
        ({"messages": "hello"}, "messages is a text that is no JSON"),
        ({"messages": '{"role": "user"}'}, "messages is object where a list was expected"),
        ({"messages": None}, "messages is null where a list was expected"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [USER]}, "no assistant turn"),
        ({"messages": [USER, "4"]}, "message 2 is text where an object was expected"),
        ({"messages": [{"content": "a"}, ASSISTANT]}, "message 1 has no 'role'"),
        ({"messages": [USER, {"role": "assistant"}]}, "message 2 has no 'content'"),
        ({"messages": [USER, {"role": "bot", "content": "4"}]}, "message 2 has role 'bot' (allowed: system, user, "),
        ({"messages": [USER, {"role": ["assistant"], "content": "4"}]}, "message 2 has role ['assistant']"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: content is null where a text"),
        (
            {"messages": [USER, {"role": "assistant", "content": [{"type": "text"}]}]},
            "message 2: content is list where",
        ),
        ({"prompt": 3, "completion": "4"}, "prompt is int where a text was expected"),
        ({"prompt": "a", "completion": None}, "completion is null where a text was expected"),
        ({"prompt": [USER], "completion": "4"}, "prompt is list where a text was expected"),
        ({"prompt": [SYSTEM], "completion": [USER]}, "no assistant turn"),
        ({"instruction": None, "output": "4"}, "instruction is null where a text was expected"),
        ({"instruction": "a", "input": 3, "output": "4"}, "input is int where a text was expected"),
        ({"instruction": "a", "output": ["4"]}, "output is list where a text was expected"),
    ],
)
def test_why_a_row_is_refused(row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        to_messages(row)


def test_a_named_format_says_which_column_is_missing() -> None:
    reason = "no column 'completion' (format prompt_completion has prompt, completion)"
    with pytest.raises(RowError, match=re.escape(reason)):
        to_messages({"prompt": "a", "output": "b"}, "prompt_completion")


def test_tool_calls_are_not_silently_left_out() -> None:
    """Trained as it stands without them, the model would learn to answer with nothing."""
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    with pytest.raises(RowError, match="tool_calls"):
        to_messages({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]})
