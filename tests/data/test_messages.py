"""What messages of a row become, what is peculiar about them, and why they are refused."""

from __future__ import annotations

import copy
import datetime
import json
import re
from typing import Any

import pytest

from sft_lab.data.formats import Conversation, RowError, to_example

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": None}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "4"}


def taken(*messages: Any, **columns: Any) -> Conversation:
    example = to_example({"messages": list(messages), **columns})
    assert isinstance(example, Conversation)
    return example


def calling(call: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call], **more}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (SYSTEM, SYSTEM),
        ({"role": "developer", "content": "Be brief."}, SYSTEM),
        ({**USER, "name": "Ann", "weight": None, "train": None, "tool_calls": None}, USER),
        ({**USER, "weight": 1, "tool_calls": [], "function_call": None}, USER),
        (
            {**USER, "content": [{"type": "text", "text": "2 +", "image_url": None}, {"type": "text", "text": " 2?"}]},
            USER,
        ),
        ({**USER, "content": "a\x00\u2028b"}, {**USER, "content": "a\x00\u2028b"}),
        ({**ASSISTANT, "weight": 0}, {**ASSISTANT, "weight": 0}),
        ({**ASSISTANT, "train": False}, {**ASSISTANT, "weight": 0}),
        ({**ASSISTANT, "train": False, "weight": 0}, {**ASSISTANT, "weight": 0}),
        ({**ASSISTANT, "train": True, "weight": None}, ASSISTANT),
        ({**ASSISTANT, "content": []}, {**ASSISTANT, "content": ""}),
    ],
)
def test_a_message_as_the_others_take_it(given: dict[str, Any], message: dict[str, Any]) -> None:
    assert taken(given, USER, ASSISTANT).messages == [message, USER, ASSISTANT]


@pytest.mark.parametrize(
    "given",
    [
        CALLING,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL["function"]]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        calling({"function": {"name": "add", "arguments": '{"a": 2, "b": null}'}, "id": None, "type": None}),
        calling({"name": "add", "arguments": {"a": 2, "b": None}, "function": None}),
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2, "b": null}'}},
    ],
)
def test_the_arguments_of_a_call_become_an_object_and_keep_their_nulls(given: dict[str, Any]) -> None:
    assert taken(USER, given, TOOL, ASSISTANT) == Conversation([USER, CALLING, TOOL, ASSISTANT], completion_from=1)


def test_words_beside_a_call_and_what_ties_an_answer_to_it_are_kept() -> None:
    call = calling({**CALL, "id": "abc"}, content="Let me see.")
    answers = [{**TOOL, "tool_call_id": "abc", "name": "add"}, {"role": "function", "name": "add", "content": "4"}]
    found = taken(USER, call, *answers, ASSISTANT).messages
    assert found == [USER, call, answers[0], {**answers[1], "role": "tool"}, ASSISTANT]


@pytest.mark.parametrize(
    "given",
    [
        {"name": "add"},
        {"name": "add", "description": None, "parameters": None},
        {"name": "add", "parameters": {"type": "object", "properties": {"a": None}}},
    ],
)
def test_a_tool_keeps_what_it_declares(given: dict[str, Any]) -> None:
    whole = [{"type": "function", "function": given}]
    for tools in ([given], whole, json.dumps([given]), [{**given, "type": "function", "function": None}]):
        assert taken(USER, ASSISTANT, tools=tools).tools == whole
    assert taken(USER, ASSISTANT, tools=[]).tools == taken(USER, ASSISTANT, tools=None).tools == []


def test_parameters_that_are_a_json_text_become_an_object() -> None:
    tools = [{"name": "add", "parameters": '{"type": "object"}'}]
    assert taken(USER, ASSISTANT, tools=tools).tools[0]["function"]["parameters"] == {"type": "object"}


def test_the_row_itself_is_left_as_it_was() -> None:
    row = {"prompt": [USER, calling(CALL), TOOL, USER], "completion": [ASSISTANT], "tools": [{"name": "add"}]}
    before = copy.deepcopy(row)
    to_example(row)
    assert row == before


@pytest.mark.parametrize(
    ("messages", "start"),
    [
        ([USER, ASSISTANT], 1),
        ([SYSTEM, USER, ASSISTANT], 2),
        ([USER, ASSISTANT, USER, CALLING, TOOL, ASSISTANT], 3),
        ([ASSISTANT], 0),
        ([SYSTEM, ASSISTANT], 1),
        ([USER, ASSISTANT, USER], 1),  # what nobody answers is no part of it
        ([USER, ASSISTANT, USER, USER], 1),
    ],
)
def test_the_completion_is_the_last_answer(messages: list[dict[str, Any]], start: int) -> None:
    assert taken(*messages).completion_from == start


@pytest.mark.parametrize(
    ("messages", "notes"),
    [
        ([SYSTEM, USER, ASSISTANT, USER, CALLING, TOOL, TOOL, ASSISTANT, USER, ASSISTANT], []),
        ([USER, USER, ASSISTANT], ["same_role_twice"]),
        ([USER, ASSISTANT, ASSISTANT, USER, USER, ASSISTANT], ["same_role_twice"]),
        ([ASSISTANT, USER, ASSISTANT], ["assistant_first"]),
        ([SYSTEM, ASSISTANT], ["assistant_first"]),
        ([USER, ASSISTANT, TOOL, TOOL, ASSISTANT], ["tool_without_call"]),
        ([USER, CALLING, TOOL, ASSISTANT, TOOL, ASSISTANT], ["tool_without_call"]),
        ([USER, ASSISTANT, USER], ["ends_with_user"]),
        ([USER, CALLING, TOOL], ["ends_with_user"]),
        ([{**USER, "content": " \n"}, ASSISTANT], ["empty_question"]),
        ([{**SYSTEM, "content": ""}, USER, CALLING, {**TOOL, "content": ""}, ASSISTANT], []),
        ([USER, {**ASSISTANT, "content": " \n"}], ["empty_answer"]),
        ([USER, {**ASSISTANT, "content": "", "weight": 0}, USER, ASSISTANT], []),
        (
            [{**ASSISTANT, "content": ""}, ASSISTANT, TOOL, USER],
            ["same_role_twice", "assistant_first", "tool_without_call", "ends_with_user", "empty_answer"],
        ),
    ],
)
def test_what_is_peculiar_is_noted_once_and_kept(messages: list[dict[str, Any]], notes: list[str]) -> None:
    assert taken(*messages).notes == notes
    assert taken(*messages).messages == messages


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, "4"], "message 2 is text where an object was expected"),
        (
            [{"rol": "user", "content": "a"}, ASSISTANT],
            "message 1 has no 'role' (it has rol, content; did you mean 'rol'?)",
        ),
        ([{"from": "human", "value": "a"}, ASSISTANT], "message 1 has no 'role' (it has from, value)"),
        ([USER, {"role": "assistant"}], "message 2 has no 'content' (it has role)"),
        ([USER, {"role": "assistant", "tool_calls": []}], "message 2 has no 'content' (it has role, tool_calls)"),
        ([USER, {"role": "bot", "content": "4"}], "message 2 has role 'bot' (allowed: system, user, assistant, tool, "),
        ([USER, {"role": "Asistant", "content": "4"}], "message 2 has role 'Asistant' (allowed: system, user, "),
        ([USER, {"role": "Asistant", "content": "4"}], "; did you mean 'assistant'?)"),
        ([USER, {"role": ["assistant"], "content": "4"}], "message 2 has role ['assistant'] (allowed: "),
        ([USER, {"role": None, "content": "4"}], "message 2 has role None (allowed: "),
        ([USER, {"role": "assistant", "content": None}], "message 2: content is null where a text was expected"),
        ([{"role": "user", "content": 4}, ASSISTANT], "message 1: content is int where a text was expected"),
        ([{"role": "user", "content": ["a"]}, ASSISTANT], "message 1: content part 1 is text where an object"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, ASSISTANT],
            "message 1: content part 2 has type 'image_url' (allowed: text, reasoning, ",
        ),
        (
            [{"role": "user", "content": [{"type": "text"}]}, ASSISTANT],
            "message 1: content part 1 has no text under text or value (it has type)",
        ),
        ([USER, {**ASSISTANT, "weight": 0.5}], "message 2 has weight 0.5 (allowed: 0, 1)"),
        ([USER, {**ASSISTANT, "weight": "1"}], "message 2 has weight '1' (allowed: 0, 1)"),
        ([USER, {**ASSISTANT, "train": "no"}], "message 2 has train 'no' (allowed: true, false)"),
        (
            [USER, {**ASSISTANT, "train": False, "weight": 1}],
            "message 2 has weight 1 and train false, which contradict",
        ),
        ([USER], "no assistant turn, so there is nothing to learn from it"),
        ([USER, {**ASSISTANT, "weight": 0}], "no assistant turn with weight 1, so there is nothing to learn from it"),
        ([USER, SYSTEM, ASSISTANT], "message 2 is a system message (allowed: only as the first)"),
        ([SYSTEM, {**SYSTEM, "role": "developer"}, USER, ASSISTANT], "message 2 is a system message"),
        ([USER, TOOL, ASSISTANT], "message 2 is a tool's and no assistant message comes before it"),
        ([USER, ASSISTANT, {**TOOL, "name": 3}], "message 3: name is int where a text was expected"),
        ([USER, ASSISTANT, {**TOOL, "tool_call_id": 3}], "message 3: tool_call_id is int where a text was expected"),
        ([{**USER, "tool_calls": [CALL]}, ASSISTANT], "message 1 has tool_calls (allowed: on an assistant's)"),
        ([USER, {**ASSISTANT, "tool_calls": CALL}], "message 2: tool_calls is object where a list was expected"),
        ([USER, {**ASSISTANT, "tool_calls": "add(2)"}], "message 2: tool_calls is a text that is no JSON"),
    ],
)
def test_why_messages_are_refused(messages: list[Any], reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        taken(*messages)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("add", "is text where an object was expected"),
        ({"type": "custom", "name": "add"}, "has type 'custom' (allowed: function)"),
        ({"type": "function", "function": "add"}, ": function is text where an object was expected"),
        ({"type": "function"}, "has no name (it has (none))"),
        ({"function": {"nam": "add", "arguments": {}}}, "has no name (it has nam, arguments; did you mean 'nam'?)"),
        ({"name": " ", "arguments": {}}, "has no name"),
        ({"name": 3, "arguments": {}}, "has no name"),
        ({"name": "add", "parameters": {}}, "has no 'arguments' (it has name, parameters; "),
        ({"name": "add", "arguments": None}, ": arguments is null where an object was expected"),
        ({"name": "add", "arguments": [2, 2]}, ": arguments is list where an object was expected"),
        ({"name": "add", "arguments": "2, 2"}, ": arguments is a text that is no JSON"),
        ({"name": "add", "arguments": '"{}"'}, ": arguments is text where an object was expected"),
        ({"name": "add", "arguments": {"day": datetime.date(2026, 1, 1)}}, ": arguments cannot be written as JSON"),
        ({"name": "add", "arguments": {"a": float("nan")}}, ": arguments cannot be written as JSON"),
        ({"name": "add", "arguments": {}, "id": 3}, ": id is int where a text was expected"),
    ],
)
def test_why_a_call_is_refused(call: Any, reason: str) -> None:
    with pytest.raises(
        RowError, match=re.escape(f"message 2: tool call 2{reason if reason[0] == ':' else f' {reason}'}")
    ):
        taken(USER, {**ASSISTANT, "tool_calls": [CALL, call]})


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ({"name": "add"}, "tools is object where a list was expected"),
        ("add", "tools is a text that is no JSON"),
        (3, "tools is int where a list was expected"),
        ([{"name": "add"}, None], "tool 2 is null where an object was expected"),
        (["add"], "tool 1 is a text that is no JSON"),
        ([{"type": "retrieval"}], "tool 1 has type 'retrieval' (allowed: function)"),
        ([{"type": "function", "function": ["add"]}], "tool 1: function is list where an object was expected"),
        ([{"description": "Adds."}], "tool 1 has no name (it has description)"),
        ([{"name": "add", "parameters": ["a"]}], "tool 1: parameters is list where an object was expected"),
        ([{"name": "add", "default": datetime.date(2026, 1, 1)}], "tool 1 cannot be written as JSON"),
    ],
)
def test_why_tools_are_refused(tools: Any, reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        taken(USER, ASSISTANT, tools=tools)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ([{"from": "human", "text": "a"}], "message 1 has no 'value' (it has from, text)"),
        ([{"from": "humann", "value": "a"}], "message 1 has from 'humann' (allowed: human, gpt, chatbot, bot, "),
        ([{"from": "humann", "value": "a"}], "; did you mean 'human'?)"),
        ([{"from": "human", "value": None}], "message 1: value is null where a text was expected"),
        ([{"from": "human", "value": "a"}, {"role": "gpt", "content": "b"}], "message 1 has no 'role'"),
        ([{"from": "function_call", "value": "add(2)"}], "message 1: function_call is a text that is no JSON"),
        ([{"from": "function_call", "value": "3"}], "message 1: function_call is int where a list was expected"),
        ([{"from": "function_call", "value": None}], "message 1: function_call is null where a list was expected"),
        ([{"from": "function_call", "value": "[]"}], "message 1: function_call is empty"),
        ([{"from": "function_call", "value": '{"name": "add"}'}], "message 1: tool call 1 has no 'arguments'"),
    ],
)
def test_why_a_sharegpt_conversation_is_refused(said: list[Any], reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        to_example({"conversations": [*said, {"from": "gpt", "value": "4"}]})
