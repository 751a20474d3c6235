"""What a row holds beside what is trained: named, or refused where it changes what the row teaches."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sft_lab.data.formats import Conversation, RowError, to_example
from sft_lab.data.unread import Unread

USER = {"role": "user", "content": "Name a fruit"}
ASSISTANT = {"role": "assistant", "content": "Pear"}
BAD = {"role": "assistant", "content": "Granite"}
CHAT = {"messages": [USER, ASSISTANT]}
PAIR = {"prompt": "Name a fruit", "completion": "Pear"}
QA = {"question": "Name a fruit", "answer": "Pear"}
ALPACA = {"instruction": "Name a fruit", "output": "Pear"}
SHAREGPT = {"conversations": [{"from": "human", "value": "Name a fruit"}, {"from": "gpt", "value": "Pear"}]}
LISTS = {"prompt": [USER], "completion": [ASSISTANT]}
TOKENS = {"input_ids": [5, 6, 7]}
CHATS = (CHAT, PAIR, QA, ALPACA, SHAREGPT, LISTS)
SYSTEM = {"role": "system", "content": "Be brief."}


def taken(row: Any, **options: Any) -> Conversation:
    example = to_example(row, **options)
    assert isinstance(example, Conversation)
    return example


def left(row: Any, **options: Any) -> tuple[dict[str, int], dict[str, int]]:
    unread = Unread()
    to_example(row, unread=unread, **options)
    return dict(unread.columns), dict(unread.keys)


def saying(**more: Any) -> dict[str, Any]:
    return {"messages": [USER, {**ASSISTANT, **more}]}


# ---------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("row", [*CHATS, {"text": "Pear"}, TOKENS])
def test_harmless_columns_are_named_where_they_hold_a_value(row: dict[str, Any]) -> None:
    more = {"id": 7, "source": "web", "score": 0.0, "notes": None, "tags": [], "meta": {"a": None}, "category": ""}
    assert left({**row, **more}) == ({"id": 1, "source": 1, "score": 1}, {})
    assert left(row) == ({}, {})


@pytest.mark.parametrize("row", CHATS)
@pytest.mark.parametrize(
    "more",
    [
        *({name: value} for name in ("label", "kto_tag", "Label") for value in (False, 0, 0.0, "0", "False", "false")),
        *({name: "x.png"} for name in ("image", "video", "audio")),
        *({name: ["x.png"]} for name in ("images", "videos", "audios", "Images")),
        {"image": {"bytes": b"x", "path": None}},
        {"chosen": "Plum", "rejected": "Granite"},
        {"chosen": {"from": "gpt", "value": "Plum"}, "rejected": {"from": "gpt", "value": "Granite"}},
        {"rejected_response": "Granite"},
        {"chosen_messages": [BAD]},
        {"documents": ["A basket of pears."]},
        {"loss_weight": 0.5},
        {"loss_mask": 0},
        {"loss": False},
        {"masked": True},
        {"chat_template": "{{ messages }}"},
    ],
)
def test_a_name_that_changes_what_a_row_teaches_is_refused_or_taken_for_nothing(
    row: dict[str, Any], more: dict[str, Any]
) -> None:
    name = next(iter(more))
    with pytest.raises(RowError, match=rf"^column {name} .*data\.ignore_columns=\[{name}"):
        to_example({**row, **more})
    assert taken({**row, **more}, ignored=frozenset(more)) == taken(row)
    assert taken({**row, **dict.fromkeys(more)}) == taken({**row, **{key: [] for key in more}}) == taken(row)


@pytest.mark.parametrize(
    "row",
    [
        {**CHAT, "label": True},
        {**PAIR, "label": 1, "kto_tag": "true"},
        {**CHAT, "label": "fruit"},
        {**CHAT, "label": 3},
        {"text": "Good film.", "label": 0},
        {**CHAT, "chosen": [USER, ASSISTANT], "rejected": [USER, BAD]},  # said twice, as in UltraFeedback
        {**CHAT, "images": [None], "image": {"bytes": None, "path": None}},
        {**PAIR, "loss_weight": 1.0, "train": True, "masked": False},
        {**PAIR, "loss": 0.0},
        {**CHAT, "context": "a basket"},  # the messages have what the author put there
        {"prompt": "In a basket of pears: name a fruit", "completion": "Pear", "context": "a basket of pears"},
        {**QA, "choices": ["fruit", "a"]},
        {**CHAT, "chosen_score": 3.0, "completion": "Plum"},
    ],
)
def test_the_same_names_with_harmless_values_train(row: dict[str, Any]) -> None:
    to_example(row)


@pytest.mark.parametrize(
    ("row", "way"),
    [
        ({**QA, "context": "Pears."}, "data.columns={instruction: question, input: context, output: answer}"),
        ({**PAIR, "input": "Pears."}, "data.columns={instruction: prompt, input: input, output: completion}"),
        ({**QA, "choices": ["Granite", "Pear"]}, "data.ignore_columns=[choices]"),
        ({**PAIR, "suffix": "Plum"}, "data.ignore_columns=[suffix]"),
        ({**ALPACA, "context": "Pears."}, "data.columns={input: context}"),
        ({**QA, "history": [["Hi", "Hello"]]}, "data.ignore_columns=[history]"),
        ({**CHAT, "history": [["Hi", "Hello"]]}, "data.ignore_columns=[history]"),
        ({**QA, "reasoning": "Pears are fruit."}, "reasoning_content in one, data.ignore_columns=[reasoning]"),
        ({"prompt": "Hi", "chosen": "Pear", "rejected": "Granite"}, "data.columns={completion: chosen}"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, BAD]}, "data.columns={messages: chosen}"),
        ({"messages": [USER], "chosen": ASSISTANT}, "data.columns={prompt: messages, completion: chosen}"),
        ({"messages": [USER], "chosen": "Pear"}, "data.columns={prompt: messages, completion: chosen}"),
        ({**LISTS, "context": "Pears."}, "(allowed: data.ignore_columns=[context]"),
        (
            {"messages": [USER, ASSISTANT, USER], "response": "Plum"},
            "data.columns={prompt: messages, completion: response}",
        ),
    ],
)
def test_a_refusal_says_the_way_out(row: dict[str, Any], way: str) -> None:
    with pytest.raises(RowError, match=re.escape(way)):
        to_example(row)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "Name a fruit", "chosen": "Pear", "rejected": "Granite"}, {"completion": "chosen"}),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [BAD]}, {"completion": "chosen"}),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, BAD]}, {"messages": "chosen"}),
        ({"messages": [USER], "chosen": ASSISTANT, "rejected": BAD}, {"prompt": "messages", "completion": "chosen"}),
        ({"messages": [USER, ASSISTANT, USER], "response": "Plum"}, {"prompt": "messages", "completion": "response"}),
        (
            {"conversations": SHAREGPT["conversations"][:1], "chosen": "Pear"},
            {"prompt": "conversations", "completion": "chosen"},
        ),
        (
            {"conversations": SHAREGPT["conversations"][:1], "chosen": SHAREGPT["conversations"][1], "rejected": BAD},
            {"prompt": "conversations", "completion": "chosen"},
        ),
        (
            {**QA, "answer": "Granite", "context": "x"},
            {"instruction": "question", "input": "context", "output": "answer"},
        ),
    ],
)
def test_the_way_out_works(row: dict[str, Any], columns: dict[str, str]) -> None:
    example = taken(row, columns=columns)
    assert example.messages[0]["content"].startswith("Name a fruit")
    assert left(row, columns=columns)[0].keys() <= {"rejected"}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"seq_lengths": [2, 1]}, True),
        ({"position_ids": [0, 1, 0]}, True),
        ({"token_type_ids": [0, 1, 1]}, True),
        ({"loss_weights": [0.0, 1.0, 1.0]}, True),
        ({"images": ["x.png"]}, True),
        ({"seq_lengths": [3], "position_ids": [0, 1, 2], "token_type_ids": [0, 0, 0]}, False),
    ],
)
def test_packed_rows_of_tokens(more: dict[str, Any], named: bool) -> None:
    if named:
        with pytest.raises(RowError, match=next(iter(more))):
            to_example({**TOKENS, **more})
    else:
        to_example({**TOKENS, **more})


# -------------------------------------------------------------------------------------------- beside a conversation


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("row", CHATS)
def test_a_column_with_the_system_prompt_is_read_in_every_chat_format(row: dict[str, Any], name: str) -> None:
    without, example = taken(row), taken({**row, name: "Be brief."})
    assert example.messages == [SYSTEM, *without.messages]
    assert example.completion_from == without.completion_from + 1
    assert taken({**row, name: None}) == taken({**row, name: ""}) == without
    with pytest.raises(RowError, match="hold different values"):
        to_example({**row, "system": "Be long.", "system_prompt": "Be brief."})


def test_a_system_prompt_that_the_messages_have_too_is_one() -> None:
    row = {"messages": [{**SYSTEM, "weight": 0}, USER, ASSISTANT], "system": "Be brief."}
    assert len(taken(row).messages) == 3
    with pytest.raises(RowError, match="the column system has another one"):
        to_example({**row, "system": "Be long."})


@pytest.mark.parametrize("row", CHATS)
def test_tools_and_variables_of_the_template_are_read_in_every_chat_format(row: dict[str, Any]) -> None:
    tool = {"name": "pick"}
    whole = [{"type": "function", "function": tool}]
    assert taken({**row, "tools": [tool]}).tools == taken({**row, "functions": [tool]}).tools == whole
    kwargs = {"enable_thinking": False}
    for given in ({"chat_template_kwargs": kwargs}, {"chat_template_kwargs": '{"enable_thinking": false}'}, kwargs):
        assert taken({**row, **given}).template_kwargs == kwargs
    assert taken({**row, "chat_template_kwargs": None}).template_kwargs == {}
    for given, reason in (
        ({"chat_template_kwargs": 3}, "chat_template_kwargs is int where an object was expected"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs sets tools"),
        ({"chat_template_kwargs": {"enable_thinking": True}, "enable_thinking": False}, "has another one"),
        ({"enable_thinking": "no"}, "enable_thinking is 'no' \\(allowed: true, false\\)"),
    ):
        with pytest.raises(RowError, match=reason):
            to_example({**row, **given})


# --------------------------------------------------------------------------------------------------- keys of messages


@pytest.mark.parametrize(
    ("off", "on"),
    [
        *(({name: 0}, {name: 1}) for name in ("weight", "loss_weight", "loss_mask", "loss_scale", "loss")),
        *(({name: 0.0}, {name: 1.0}) for name in ("loss_weight", "loss_scale")),
        *(({name: False}, {name: True}) for name in ("train", "training", "loss", "trainable")),
        ({"masked": True}, {"masked": False}),
        ({"loss": False, "masked": True, "weight": None}, {"loss": True, "weight": 1}),
    ],
)
def test_switches_of_other_tools_keep_the_loss_off_a_message(off: dict[str, Any], on: dict[str, Any]) -> None:
    row = {"messages": [USER, {**BAD, **off}, USER, {**ASSISTANT, **on}]}
    assert taken(row).messages == [USER, {**BAD, "weight": 0}, USER, ASSISTANT]
    assert left(row) == ({}, {})
    spoken = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **on, **off}]}
    with pytest.raises(RowError, match="no assistant turn with weight 1"):
        to_example(spoken)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"loss_weight": 0.5}, "message 2 has loss_weight 0.5 (allowed: 0, 1)"),
        ({"masked": "yes"}, "message 2 has masked 'yes' (allowed: true, false)"),
        ({"loss": True, "masked": True}, "message 2 has loss true and masked true, which contradict each other"),
        ({"train_detail": [{"begin_offset": 0}]}, "message 2 has train_detail [{'begin_offset': 0}], a switch of the"),
        ({"mask": False}, "message 2 has mask False, a switch of the loss that is not known"),
        ({"train_on_turn": False}, "message 2 has train_on_turn False"),
        ({"images": ["x.png"]}, "message 2 has images ['x.png'], which is not read: only words are learned"),
        ({"prefix": True}, "message 2 has prefix True, so the answer goes on"),
        ({"end_turn": False}, "message 2 has end_turn False, so the answer goes on"),
        ({"eot": False}, "message 2 has eot False"),
        ({"channel": "analysis"}, "message 2 has channel 'analysis'"),
        ({"recipient": "functions.pick"}, "message 2 has recipient 'functions.pick'"),
        ({"thought": "Hm."}, "message 2 has thought 'Hm.', which is not read (a thought is, under reasoning_content"),
        ({"refusal": "No.", "content": None}, "message 2 has refusal 'No.'"),
        ({"tools": [{"name": "pick"}]}, "message 2 has tools "),
        ({"reasoning": "a", "thinking": "b"}, "message 2 has different thoughts in reasoning and thinking"),
    ],
)
def test_a_key_that_changes_how_a_message_trains_is_refused(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        to_example(saying(**more))
    if "contradict" not in reason and "different" not in reason and "refusal" not in more:
        assert taken(saying(**more), ignored=frozenset(more)) == taken(CHAT)


@pytest.mark.parametrize(
    "more",
    [
        {"prefix": False, "end_turn": True, "eot": True, "channel": "final", "recipient": "all", "ipython": False},
        {"name": "Ann", "id": 3, "timestamp": "now", "loss_type": "mean"},
    ],
)
def test_other_keys_are_named(more: dict[str, Any]) -> None:
    assert left(saying(**more)) == ({}, dict.fromkeys(more, 1))
    assert left(saying(**dict.fromkeys(more))) == ({}, {})


def test_keys_of_parts_calls_and_thoughts_of_others_are_named_too() -> None:
    call = {"id": "a", "index": 0, "function": {"name": "pick", "arguments": {}, "strict": True}}
    said = [{"type": "text", "text": "Hm.", "cache_control": {"type": "ephemeral"}}]
    row = {"messages": [{**USER, "reasoning": "x"}, {"role": "assistant", "content": said, "tool_calls": [call]}]}
    keys = {"reasoning", "content.cache_control", "tool_calls.index", "tool_calls.strict"}
    assert left(row) == ({}, dict.fromkeys(keys, 1))


@pytest.mark.parametrize(
    ("more", "noted"), [({"loss": True}, True), ({"weight": 1}, False), ({"masked": False}, False)]
)
def test_a_question_that_asks_for_loss_is_noted(more: dict[str, Any], noted: bool) -> None:
    assert ("asks_for_loss" in taken({"messages": [{**USER, **more}, ASSISTANT]}).notes) is noted


# --------------------------------------------------------------------------------------------------------------- parts

CALL = {"type": "function", "function": {"name": "pick", "arguments": {"n": 1}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "text", "value": "Pear"}], ASSISTANT),
        ([{"type": "output_text", "text": "Pear", "annotations": []}], ASSISTANT),
        (
            [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Pear"}],
            {**ASSISTANT, "reasoning_content": "Hm."},
        ),
        (
            [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {"type": "text", "text": "Pear"}],
            {**ASSISTANT, "reasoning_content": "Hm."},
        ),
        (
            [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Pear"}],
            {**ASSISTANT, "reasoning_content": "Hm."},
        ),
        (
            [
                {"type": "text", "value": "Pear"},
                {"type": "tool_call", "value": '{"name": "pick", "arguments": {"n": 1}}'},
            ],
            {**ASSISTANT, "tool_calls": [CALL]},
        ),
        (
            [{"type": "tool_use", "id": "a", "name": "pick", "input": {"n": 1}}],
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "a"}]},
        ),
    ],
)
def test_parts_become_words_thoughts_and_calls(content: list[Any], message: dict[str, Any]) -> None:
    assert taken({"messages": [USER, {"role": "assistant", "content": content}]}).messages == [USER, message]


@pytest.mark.parametrize("result", ["1 pear", [{"type": "text", "text": "1 pear"}]])
def test_results_in_a_users_parts_are_messages_of_the_tool(result: Any) -> None:
    asked = {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "pick", "input": {}}]}
    answer = {"type": "tool_result", "tool_use_id": "a", "content": result}
    tool = {"role": "tool", "content": "1 pear", "tool_call_id": "a"}
    for rest in ([], [{"type": "text", "text": "Name a fruit"}]):
        found = taken(
            {"prompt": [USER, asked, {"role": "user", "content": [answer, *rest]}], "completion": [ASSISTANT]}
        )
        assert found.messages[2:] == [tool, *([USER] if rest else []), ASSISTANT]
        assert found.completion_from == len(found.messages) - 1


@pytest.mark.parametrize(
    ("role", "content", "reason"),
    [
        ("assistant", [{"type": "image", "url": "x"}], "part 1 has type 'image' (allowed: text, reasoning, thinking, "),
        ("assistant", [{"text": "a"}], "part 1 has type None (allowed: text, "),
        ("assistant", [{"type": "text", "words": "a"}], "part 1 has no text under text or value (it has type, words)"),
        ("assistant", [{"type": "text", "value": 3}], "part 1: value is int where a text was expected"),
        (
            "user",
            [{"type": "thinking", "thinking": "a"}],
            "part 1 has type thinking (allowed: on an assistant's message)",
        ),
        (
            "assistant",
            [{"type": "text", "text": "a"}, {"type": "reasoning", "value": "b"}],
            "part 2 is a thought after words",
        ),
        (
            "assistant",
            [{"type": "tool_call", "name": "pick", "arguments": {}}, {"type": "text", "text": "a"}],
            "part 2 says words after a call",
        ),
        ("assistant", [{"type": "tool_call", "value": "pick(1)"}], "part 1: value is a text that is no JSON"),
        ("assistant", [{"type": "tool_result", "content": "a"}], "part 1 has type tool_result (allowed: on a user's"),
    ],
)
def test_parts_that_cannot_be_said_are_refused(role: str, content: list[Any], reason: str) -> None:
    with pytest.raises(RowError, match=re.escape(reason)):
        to_example({"messages": [{"role": role, "content": content}, USER, ASSISTANT]})
