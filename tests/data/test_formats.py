"""From rows of any format to what is trained, which format `auto` takes, and why a row is refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from sft_lab import schema
from sft_lab.data.formats import (
    FORMAT_NAMES,
    FORMATS,
    Conversation,
    LeftOut,
    RowError,
    Text,
    Tokens,
    detect,
    possible_formats,
    text_of,
    to_example,
)

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
HUMAN, GPT = {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
ADD = {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
TOOL = {"type": "function", "function": ADD}


def conversation_of(row: Any, name: str = "auto", columns: dict[str, str] | None = None) -> Conversation:
    example = to_example(row, name, columns or {})
    assert isinstance(example, Conversation)
    return example


@pytest.mark.parametrize(
    ("name", "row", "messages"),
    [
        ("messages", {"messages": [SYSTEM, USER, ASSISTANT], "id": 7}, [SYSTEM, USER, ASSISTANT]),
        ("messages", {"messages": json.dumps([USER, ASSISTANT]), "tools": ""}, None),
        ("sharegpt", {"conversations": [HUMAN, GPT]}, None),
        ("sharegpt", {"conversations": json.dumps([HUMAN, GPT]), "system": "", "tools": None}, None),
        ("sharegpt", {"conversations": [HUMAN, GPT], "system": "Be brief."}, [SYSTEM, USER, ASSISTANT]),
        (
            "sharegpt",
            {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]},
            [SYSTEM, USER, ASSISTANT],
        ),
        ("sharegpt", {"conversations": [SYSTEM, USER, ASSISTANT], "system": "Be brief."}, [SYSTEM, USER, ASSISTANT]),
        ("sharegpt", {"conversations": [USER, {"role": "gpt", "content": "4", "from": None, "value": None}]}, None),
        ("prompt_completion", {"prompt": "2 + 2?", "completion": "4"}, None),
        ("prompt_completion", {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER, ASSISTANT]),
        ("alpaca", {"instruction": "2 + 2?", "input": "", "output": "4"}, None),
        ("alpaca", {"instruction": "2 + 2?", "input": None, "output": "4", "system": None, "history": None}, None),
        (
            "alpaca",
            {"instruction": "Add.", "input": "2, 2", "output": "4"},
            [{"role": "user", "content": "Add.\n\n2, 2"}, ASSISTANT],
        ),
        ("alpaca", {"system": "Be brief.", "instruction": "2 + 2?", "output": "4"}, [SYSTEM, USER, ASSISTANT]),
        ("question_answer", {"question": "2 + 2?", "answer": "4"}, None),
    ],
)
def test_rows_become_messages(name: str, row: dict[str, Any], messages: list[dict[str, str]] | None) -> None:
    """By the columns, and by the format's name; `None` stands for the one question and answer."""
    assert detect(row) == name
    assert conversation_of(row) == conversation_of(row, name)
    assert conversation_of(row).messages == (messages or [USER, ASSISTANT])
    assert conversation_of(row).notes == []


def test_the_config_may_choose_every_format_that_is_tried_here() -> None:
    conversations = ("messages", "sharegpt", "prompt_completion", "alpaca", "question_answer")
    assert ("auto", "tokens", *conversations, "text") == FORMAT_NAMES
    assert tuple(FORMATS) == FORMAT_NAMES[1:]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("user", ["human", "user"]),
        ("assistant", ["gpt", "assistant", "chatbot", "bot", "model"]),
        ("tool", ["tool", "observation", "function_response"]),
    ],
)
def test_every_name_that_sharegpt_has_for_a_role(ours: str, theirs: list[str]) -> None:
    for name in theirs:
        said = [HUMAN, GPT, {"from": name, "value": "five"}, HUMAN, GPT]
        assert conversation_of({"conversations": said}).messages[2] == {"role": ours, "content": "five"}


@pytest.mark.parametrize("one_or_more", [{"name": "add", "arguments": {"a": 2, "b": 2}}, [CALL["function"]]])
@pytest.mark.parametrize("tools", [[TOOL], [ADD], json.dumps([TOOL]), json.dumps([ADD]), [json.dumps(ADD)]])
def test_sharegpt_with_tools(one_or_more: Any, tools: Any) -> None:
    said = [
        HUMAN,
        {"from": "function_call", "value": json.dumps(one_or_more)},
        {"from": "observation", "value": "4"},
        GPT,
    ]
    found = conversation_of({"conversations": said, "tools": tools})
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert found.messages == [USER, call, {"role": "tool", "content": "4"}, ASSISTANT]
    assert (found.tools, found.completion_from, found.notes) == ([TOOL], 1, [])


@pytest.mark.parametrize("history", [[["1 + 1?", "2"]], '[["1 + 1?", "2"]]'])
def test_what_was_said_before_is_no_part_of_the_completion(history: Any) -> None:
    before = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    row = {"instruction": "2 + 2?", "output": "4", "history": history, "system": "Be brief."}
    assert conversation_of(row) == Conversation([SYSTEM, *before, USER, ASSISTANT], completion_from=4)


def test_only_the_completion_is_learned() -> None:
    prompt, completion = [USER, ASSISTANT, USER], [ASSISTANT, USER, ASSISTANT]
    for before in (ASSISTANT, {**ASSISTANT, "weight": 1}, {**ASSISTANT, "train": True}):
        found = conversation_of({"prompt": [USER, before, USER], "completion": completion, "tools": [ADD]})
        assert found.messages == [USER, {**ASSISTANT, "weight": 0}, USER, *completion]
        assert (found.completion_from, found.tools) == (len(prompt), [TOOL])


# ----------------------------------------------------------------------------------------------------- text, tokens


def test_a_text_is_kept_as_it_is() -> None:
    assert to_example({"text": " a\x00b\n"}) == to_example({"text": " a\x00b\n"}, "text") == Text(" a\x00b\n")


@pytest.mark.parametrize(
    ("more", "labels"),
    [
        ({}, [5, 6, 7]),
        ({"labels": None, "completion_mask": None, "assistant_masks": "", "attention_mask": [1, 1, 1]}, [5, 6, 7]),
        ({"labels": [-100, 6, -100]}, [-100, 6, -100]),
        ({"labels": "[-100, 6, 7]"}, [-100, 6, 7]),
        ({"completion_mask": [0, 1, 1]}, [-100, 6, 7]),
        ({"assistant_masks": [0, 0, 1]}, [-100, -100, 7]),
        ({"completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]}, [-100, 6, -100]),
        ({"labels": [-100, 6, 7], "completion_mask": [1, 1, 0]}, [-100, 6, -100]),
    ],
)
def test_tokens_and_which_of_them_are_learned(more: dict[str, Any], labels: list[int]) -> None:
    assert to_example({"input_ids": [5, 6, 7], **more}) == Tokens([5, 6, 7], labels)
    assert to_example({"input_ids": "[5, 6, 7]", **more}, "tokens") == Tokens([5, 6, 7], labels)


# -------------------------------------------------------------------------------------- which format, which columns


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"text": "a", "messages": [USER, ASSISTANT], "prompt": "b", "completion": "c"}),
        ("sharegpt", {"text": "a", "conversations": [HUMAN, GPT]}),
        ("alpaca", {"text": "a", "instruction": "b", "input": "", "output": "c"}),
        ("question_answer", {"text": "a", "question": "b", "answer": "c"}),
        ("tokens", {"text": "a", "messages": [USER, ASSISTANT], "input_ids": [1]}),
        ("text", {"messages": None, "input_ids": None, "text": "a"}),  # one table made of rows of several formats
        ("messages", {"messages": None}),
    ],
)
def test_which_of_several_formats_is_taken(name: str, row: dict[str, Any]) -> None:
    assert detect(row) == name


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"prompt": "question", "completion": "answer"}, {"question": "2 + 2?", "answer": "4"}),
        ({"question": "q"}, {"q": "2 + 2?", "answer": "4"}),
        ({"question": "q.0.en", "answer": "a.text"}, {"q": [{"en": "2 + 2?"}], "a": {"text": "4"}}),
        ({"question": "q.en"}, {"q.en": "2 + 2?", "q": {"en": "other"}, "answer": "4"}),
        ({"output": "input", "input": "output"}, {"instruction": "2 + 2?", "input": "4", "output": ""}),
        ({"messages": "turns.1"}, {"turns": [[], [USER, ASSISTANT]], "text": "other"}),
        # what is mapped says which format is meant, whatever other columns there are
        ({"question": "q", "answer": "a"}, {"q": "2 + 2?", "a": "4", "messages": "of another kind"}),
        ({"weight": "use"}, {"question": "2 + 2?", "answer": "4", "use": 1, "weight": "heavy"}),
    ],
)
def test_columns_by_other_names(columns: dict[str, str], row: dict[str, Any]) -> None:
    assert conversation_of(row, columns=columns).messages == [USER, ASSISTANT]


@pytest.mark.parametrize("weight", [0, 0.0, "0", False])
def test_a_row_of_weight_0_is_left_out_whatever_it_holds(weight: Any) -> None:
    for row in ({"text": "a"}, {"messages": []}, {"input_ids": [-1]}):
        with pytest.raises(LeftOut, match=r"^weight_0$"):
            to_example({**row, "weight": weight})
        with pytest.raises(LeftOut):
            to_example({**row, "use": weight}, columns={"weight": "use"})


@pytest.mark.parametrize("weight", [1, 1.0, "1", True, None, ""])
def test_a_row_of_weight_1_is_a_row(weight: Any) -> None:
    assert to_example({"text": "a", "weight": weight}) == Text("a")


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([USER], "a list where an object was expected"),
        (None, "a null where an object was expected"),
        ("text", "a text where an object was expected"),
        ({}, "columns (none) fit no format (tokens: input_ids; messages: messages; sharegpt: conversations; prompt_"),
        ({"mesages": []}, "columns mesages fit no format"),
        ({"mesages": []}, "; text: text; did you mean 'messages'?)"),
        ({"instruction": "a", "Outputs": "b"}, "; did you mean 'output'?)"),
        ({"prompt": "a"}, "columns prompt fit no format"),
        ({"prompt": "a"}, "; data.columns maps other names to these)"),
        ({f"c{i}": 0 for i in range(30)}, "c10, c11 and 18 more fit no format"),
        ({"text": "a", "weight": 0.5}, "weight is 0.5 (allowed: 0, which leaves the row out, and 1)"),
        ({"text": "a", "weight": "high"}, "weight is 'high' (allowed: 0"),
        ({"text": "a", "weight": [0]}, "weight is [0] (allowed: 0"),
        ({"messages": "hello"}, "messages is a text that is no JSON (Expecting value"),
        ({"messages": '[{"role": NaN}]'}, "messages is a text that is no JSON (it has NaN)"),
        ({"messages": "[" * 100_000}, "messages is a text that is no JSON"),
        ({"messages": '{"role": "user"}'}, "messages is object where a list was expected"),
        ({"messages": None}, "messages is null where a list was expected"),
        ({"messages": []}, "messages is empty"),
        ({"conversations": 3}, "conversations is int where a list was expected"),
        ({"conversations": [HUMAN, GPT], "system": 3}, "system is int where a text was expected"),
        ({"conversations": [SYSTEM, USER, ASSISTANT], "system": "Be long."}, "the column system has another one"),
        ({"prompt": 3, "completion": "4"}, "prompt is int and completion is text (allowed: two texts, two lists of"),
        ({"prompt": "a", "completion": None}, "prompt is text and completion is null"),
        ({"prompt": "2 + 2?", "completion": [ASSISTANT]}, "prompt is text and completion is list (allowed: two texts"),
        ({"prompt": [SYSTEM], "completion": [USER]}, "no assistant turn, so there is nothing to learn"),
        ({"prompt": [], "completion": []}, "no assistant turn"),
        ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "no assistant turn with weight 1 in the completion"),
        ({"instruction": None, "output": "4"}, "instruction is null where a text was expected"),
        ({"instruction": "a", "input": 0, "output": "4"}, "input is int where a text was expected"),
        ({"instruction": "a", "output": ["4"]}, "output is list where a text was expected"),
        ({"instruction": "a", "output": "4", "system": False}, "system is bool where a text was expected"),
        ({"instruction": "a", "output": "4", "history": "b"}, "history is a text that is no JSON"),
        ({"instruction": "a", "output": "4", "history": {"b": "c"}}, "history is object where a list was expected"),
        (
            {"instruction": "a", "output": "4", "history": [["b", "c"], ["d"]]},
            "history 2 is a list of 1 where a question",
        ),
        ({"instruction": "a", "output": "4", "history": ["bc"]}, "history 1 is text where a question and its answer"),
        ({"instruction": "a", "output": "4", "history": [[None, "c"]]}, "history 1: question is null where a text"),
        ({"instruction": "a", "output": "4", "history": [["b", 3]]}, "history 1: answer is int where a text"),
        ({"question": 3, "answer": "4"}, "question is int where a text was expected"),
        ({"question": "a", "answer": None}, "answer is null where a text was expected"),
        ({"text": None}, "text is null where a text was expected"),
        ({"text": " \n"}, "text is blank, so there is nothing to learn from it"),
        ({"input_ids": None}, "input_ids is null where a list was expected"),
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": "5 6"}, "input_ids is a text that is no JSON"),
        ({"input_ids": [5, -6]}, "input_ids[1] is -6 (allowed: whole numbers from 0 to 2147483647)"),
        ({"input_ids": [True, 6]}, "input_ids[0] is True (allowed: whole"),
        ({"input_ids": [5, 6.0]}, "input_ids[1] is 6.0 (allowed: whole"),
        ({"input_ids": [5, [6]]}, "input_ids[1] is [6] (allowed: whole"),
        (
            {"input_ids": [5, 6], "labels": [5]},
            "labels has 1 entries where a list of 2 was expected, as many as input_ids",
        ),
        ({"input_ids": [5, 6], "labels": 5}, "labels is int where a list of 2 was expected"),
        ({"input_ids": [5, 6], "labels": [5, 7]}, "labels[1] is 7 where input_ids[1] is 6 (allowed: that, -100)"),
        ({"input_ids": [5, 6], "labels": [None, 6]}, "labels[0] is None where input_ids[0] is 5"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "every label is -100, so there is nothing to learn"),
        ({"input_ids": [5, 6], "completion_mask": [0, 2]}, "completion_mask[1] is 2 (allowed: 0, 1)"),
        ({"input_ids": [5, 6], "assistant_masks": [0]}, "assistant_masks has 1 entries where a list of 2"),
        ({"input_ids": [5, 6], "assistant_masks": [0, 0]}, "every label is -100"),
        ({"input_ids": [5, 6], "attention_mask": [1, 0]}, "attention_mask has a 0: a padded row is not taken"),
    ],
)
def test_why_a_row_is_refused(row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        to_example(row)


@pytest.mark.parametrize(
    ("row", "name", "columns", "reason"),
    [
        (
            {"prompt": "a", "completions": "b"},
            "prompt_completion",
            {},
            "no column 'completion' (format prompt_completion has prompt, completion, the row prompt, completions; "
            "did you mean 'completions'?)",
        ),
        ({"text": "a"}, "messages", {}, "no column 'messages' (format messages has messages, the row text)"),
        (
            {"Question": "a", "answer": "b"},
            "auto",
            {"prompt": "question"},
            "no column 'question', which columns maps to 'prompt' (the row has Question, answer; did you mean 'Question'?)",
        ),
        (
            {"instances": [{"input": "a"}]},
            "alpaca",
            {"input": "instances.0.inputs"},
            "no column 'instances.0.inputs', which columns maps to 'input' (instances.0 has input; did you mean 'input'?)",
        ),
        ({"turns": ["a"]}, "auto", {"text": "turns.1"}, "(turns is a list of 1, counted from 0)"),
        ({"turns": ["a"]}, "auto", {"text": "turns.-1"}, "(turns is a list of 1, counted from 0)"),
        ({"turns": None}, "auto", {"text": "turns.0"}, "(turns is null)"),
        ({"turns": "abc"}, "auto", {"text": "turns.0"}, "(turns is text)"),
        ({"a": "b"}, "auto", {"promt": "a"}, "columns maps 'promt', which no format has (allowed: input_ids, "),
        ({"a": "b"}, "auto", {"promt": "a"}, "did you mean 'prompt'?)"),
        (
            {"a": "b"},
            "alpaca",
            {"answer": "a"},
            "columns maps 'answer', which format alpaca has not (allowed: instruct",
        ),
        (
            {"a": "b"},
            "auto",
            {"prompt": "a", "answer": "a"},
            "columns maps prompt, answer, which no format has together",
        ),
        (
            {"a": "b", "answer": "c"},
            "auto",
            {"prompt": "a"},
            "columns a, answer, prompt fit no format (prompt_completion: ",
        ),
    ],
)
def test_why_columns_are_refused(row: dict[str, Any], name: str, columns: dict[str, str], reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        to_example(row, name, columns)


def test_what_is_mapped_narrows_the_formats_without_a_row() -> None:
    assert possible_formats("auto", {}) == tuple(FORMATS)
    chats = ("messages", "sharegpt", "prompt_completion", "alpaca", "question_answer")
    assert possible_formats("auto", {"tools": "functions"}) == chats
    assert possible_formats("auto", {"prompt": "a", "weight": "b"}) == ("prompt_completion",)
    assert possible_formats("alpaca", {"output": "a"}) == ("alpaca",)


# ------------------------------------------------------------------------------------------------- files, comparing


def test_rows_of_a_parquet_file_whose_absent_fields_are_null(tmp_path: Path) -> None:
    """Arrow gives every message of a column the same fields."""
    messages = [{**USER, "weight": 0}, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}]
    rows = [
        {"messages": messages, "tools": None, "text": None},
        {"messages": [USER, {**ASSISTANT, "train": True}], "tools": json.dumps([ADD])},
        {"text": "a"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    first, second, third = pyarrow.parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert first["messages"][1]["content"] is None
    assert third["messages"] is None
    assert conversation_of(first).messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert conversation_of(second) == Conversation([USER, ASSISTANT], [TOOL], completion_from=1)
    assert to_example(third) == Text("a")


def test_rows_of_a_csv_file_whose_cells_are_texts(tmp_path: Path) -> None:
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["messages", "tools", "weight"], restval="")
        writer.writeheader()
        writer.writerow({"messages": json.dumps([USER, ASSISTANT]), "weight": "1"})
        writer.writerow({"messages": json.dumps([USER, ASSISTANT]), "tools": json.dumps([ADD])})
        writer.writerow({"messages": json.dumps([USER, ASSISTANT]), "weight": "0"})
    with open(tmp_path / "rows.csv", newline="") as file:
        first, second, third = csv.DictReader(file)
    assert conversation_of(first) == Conversation([USER, ASSISTANT], completion_from=1)
    assert conversation_of(second).tools == [TOOL]
    with pytest.raises(LeftOut):
        to_example(third)


def test_rows_that_say_the_same_have_the_same_text() -> None:
    with_id = {**CALL, "id": "abc"}
    same = [
        {"messages": [USER, {**ASSISTANT, "weight": 1}]},
        {"conversations": [HUMAN, GPT]},
        {"question": "2 + 2?", "answer": "4"},
    ]
    assert {text_of(to_example(row)) for row in same} == {"user\n2 + 2?\nassistant\n4"}
    calls = [
        text_of(to_example({"messages": [USER, {"role": "assistant", "tool_calls": [c]}]})) for c in (CALL, with_id)
    ]
    assert calls == ['user\n2 + 2?\nassistant\n{"arguments": {"a": 2, "b": 2}, "name": "add"}'] * 2
    assert text_of(Text("a\nb")) == "a\nb"
    assert text_of(Tokens([5, 6], [-100, 6])) == "5 6"


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [USER, {**ASSISTANT, "content": "5"}]},
        {"messages": [SYSTEM, USER, ASSISTANT]},
        {"messages": [USER, {**ASSISTANT, "tool_calls": [CALL]}]},
        {"messages": [USER, ASSISTANT, {"role": "tool", "content": ""}]},
        {"messages": [USER, {**ASSISTANT, "reasoning_content": "Two and two."}]},
        {"messages": [USER, {**ASSISTANT, "reasoning": "Two and two."}]},
        {"messages": [USER, ASSISTANT], "tools": [ADD]},
    ],
)
def test_rows_that_say_something_else_have_another_text(other: dict[str, Any]) -> None:
    assert text_of(to_example(other)) != text_of(to_example({"messages": [USER, ASSISTANT]}))


def test_the_config_offers_each_format_and_no_other() -> None:
    assert set(schema.FORMATS) == set(FORMAT_NAMES)
