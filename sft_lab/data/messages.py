"""Chat messages as the rest of sft_lab takes them, made of those in a row, or the reason why they cannot be trained on.

A message is `{"role": ..., "content": ...}` with role system, user, assistant or tool and a text as content. It may
have `"weight": 0` (no loss on it), an assistant's also `tool_calls` and `reasoning_content`, a tool's also `name` and
`tool_call_id`.
Files read through Arrow give every absent field of an object as null, so null stands for absent wherever a key is
optional. Inside the arguments of a call and the parameters of a tool nulls are data and stay.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from sft_lab.data.values import RowError, from_json, json_object, kind, listed, nearest, non_empty_list, present, text

Message = dict[str, Any]
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # one thing, by the names that data sets have for it
ROLES = ("system", "user", "assistant", "tool")


@dataclass
class Conversation:
    """Validated messages with at least one assistant turn to learn.

    tools: `{"type": "function", "function": {...}}` each, as chat templates take them.
    completion_from: index of the first message that belongs to the completion.
    template_kwargs: what the row gives the chat template, such as enable_thinking.
    notes: names of what is peculiar about it, each at most once (see `_notes`).
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    completion_from: int = 0
    notes: list[str] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


class Dialect(NamedTuple):
    """How a data set writes messages: its two keys, and its names of the roles with ours."""

    role: str
    content: str
    roles: Mapping[str, str]


# `developer` is the newer models' name of system, `function` the first API's name of tool.
OPENAI = Dialect("role", "content", {**{role: role for role in ROLES}, "developer": "system", "function": "tool"})


def conversation(
    messages: list[Any], tools: Any = None, dialect: Dialect = OPENAI, prompt: int | None = None
) -> Conversation:
    """A conversation of a row's messages, of which the first `prompt` are given to the model and not learned.

    Raises:
        RowError: naming the message, counted from 1, that cannot be taken.
    """
    clean = [_message(message, f"message {number}", dialect) for number, message in enumerate(messages, start=1)]
    for message in clean[:prompt] if prompt else []:
        if message["role"] == "assistant":
            message["weight"] = 0
    _check_order(clean)
    _check_learned(clean, prompt)
    start = _completion_start(clean) if prompt is None else prompt
    return Conversation(clean, _tools(tools), start, _notes(clean))


def _message(message: Any, where: str, dialect: Dialect) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"{where} is {kind(message)} where an object was expected")
    for key in (dialect.role, dialect.content):
        if key not in message and not (key == dialect.content and _calls_of(message)):
            raise RowError(f"{where} has no {key!r} (it has {listed(message)}{nearest(key, message)})")
    name, content = message[dialect.role], message.get(dialect.content)
    role = dialect.roles.get(name) if isinstance(name, str) else None
    if role is None:
        hint = f"{', '.join(dialect.roles)}{nearest(name, dialect.roles)}"
        raise RowError(f"{where} has {dialect.role} {reprlib.repr(name)} (allowed: {hint})")
    if name == "function_call":
        calls, content = _one_or_more(content, f"{where}: {name}"), None
    else:
        calls = _calls_of(message)
    words = "" if content is None and calls else _content(content, f"{where}: {dialect.content}")
    clean: Message = {"role": role, "content": words}
    if not _weight(message, where):
        clean["weight"] = 0
    if calls:
        if role != "assistant":
            raise RowError(f"{where} has tool_calls (allowed: on an assistant's)")
        clean["tool_calls"] = _tool_calls(calls, where)
    thought = next((message[key] for key in _THOUGHTS if present(message, key)), "")
    if thought and role == "assistant":
        clean["reasoning_content"] = text(thought, f"{where}: reasoning_content")
    if role == "tool":
        clean |= {
            key: text(message[key], f"{where}: {key}") for key in ("name", "tool_call_id") if present(message, key)
        }
    return clean


def _content(content: Any, where: str) -> str:
    """The text, or the texts of all parts put together as chat templates do it, with nothing in between."""
    if not isinstance(content, list):
        return text(content, where)
    words = []
    for number, part in enumerate(content, start=1):
        if not isinstance(part, Mapping):
            raise RowError(f"{where} part {number} is {kind(part)} where an object was expected")
        if part.get("type") != "text":
            raise RowError(f"{where} part {number} has type {reprlib.repr(part.get('type'))} (allowed: text)")
        words.append(text(part.get("text"), f"{where} part {number}: text"))
    return "".join(words)


def _weight(message: Mapping[str, Any], where: str) -> bool:
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"{where} has weight {reprlib.repr(weight)} (allowed: 0, 1)")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{where} has train {reprlib.repr(train)} (allowed: true, false)")
    if weight is not None and train is not None and bool(weight) != train:
        raise RowError(f"{where} has weight {weight} and train {str(train).lower()}, which contradict each other")
    return bool(weight) if weight is not None else train is not False


# ----------------------------------------------------------------------------------------------------------- tools


def _calls_of(message: Mapping[str, Any]) -> Any:
    """`tool_calls`, or the one call that the first API had instead; None where there is none."""
    if message.get("tool_calls"):
        return message["tool_calls"]
    call = message.get("function_call")
    return [call] if call is not None else None


def _one_or_more(calls: Any, where: str) -> list[Any]:
    calls = from_json(calls, where)
    return [calls] if isinstance(calls, Mapping) else non_empty_list(calls, where)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    calls = from_json(calls, f"{where}: tool_calls")
    if not isinstance(calls, list):
        raise RowError(f"{where}: tool_calls is {kind(calls)} where a list was expected")
    return [_tool_call(call, f"{where}: tool call {number}") for number, call in enumerate(calls, start=1)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = _function(call, where)
    if "arguments" not in function:
        raise RowError(f"{where} has no 'arguments' (it has {listed(function)}{nearest('arguments', function)})")
    arguments = json_object(function["arguments"], f"{where}: arguments")
    clean = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if present(call, "id"):  # some templates write it, and refuse a call without
        clean["id"] = text(call["id"], f"{where}: id")
    return clean


def _tools(tools: Any) -> list[dict[str, Any]]:
    """Declared tools from a list of them, or from a JSON text."""
    if tools in (None, ""):
        return []
    tools = from_json(tools, "tools")
    if not isinstance(tools, list):
        raise RowError(f"tools is {kind(tools)} where a list was expected")
    return [_tool(from_json(tool, f"tool {number}"), f"tool {number}") for number, tool in enumerate(tools, start=1)]


def _tool(tool: Any, where: str) -> dict[str, Any]:
    function = json_object(_function(tool, where), where)
    if present(function, "parameters"):
        function["parameters"] = json_object(function["parameters"], f"{where}: parameters")
    return {"type": "function", "function": function}


def _function(value: Any, where: str) -> Mapping[str, Any]:
    """The function of a call or a tool, which stands under the key `function`, or bare."""
    if not isinstance(value, Mapping):
        raise RowError(f"{where} is {kind(value)} where an object was expected")
    if value.get("type") not in (None, "function"):
        raise RowError(f"{where} has type {reprlib.repr(value['type'])} (allowed: function)")
    bare = {key: item for key, item in value.items() if key not in ("type", "function", "id")}
    function = value["function"] if present(value, "function") else bare
    if not isinstance(function, Mapping):
        raise RowError(f"{where}: function is {kind(function)} where an object was expected")
    if not isinstance(function.get("name"), str) or not function["name"].strip():
        raise RowError(f"{where} has no name (it has {listed(function)}{nearest('name', function)})")
    return function


# ------------------------------------------------------------------------------------------------ the whole of it


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise RowError(f"message {roles.index('system', 1) + 1} is a system message (allowed: only as the first)")
    if "tool" in roles and "assistant" not in roles[: roles.index("tool")]:
        raise RowError(f"message {roles.index('tool') + 1} is a tool's and no assistant message comes before it")


def _check_learned(messages: list[Message], prompt: int | None) -> None:
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if not any(weights):
        which = "" if not weights else " with weight 1" if prompt is None else " with weight 1 in the completion"
        raise RowError(f"no assistant turn{which}, so there is nothing to learn from it")


def _completion_start(messages: list[Message]) -> int:
    """Where the last answer begins: after the last user message that one follows, with its calls of tools."""
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return 1 + max((i for i in range(last) if messages[i]["role"] in ("system", "user")), default=-1)


def _notes(messages: list[Message]) -> list[str]:
    roles = [message["role"] for message in messages]
    calls, tool_without_call = False, False
    for message in messages:
        if message["role"] == "assistant":
            calls = "tool_calls" in message
        elif message["role"] == "tool":
            tool_without_call |= not calls
    found = {
        "same_role_twice": any(a == b and a in ("user", "assistant") for a, b in pairwise(roles)),
        "assistant_first": "user" not in roles[: roles.index("assistant")],
        "tool_without_call": tool_without_call,
        "ends_with_user": roles[-1] != "assistant",  # whatever follows the last answer is never learned
        "empty_question": any(m["role"] == "user" and not m["content"].strip() for m in messages),
        "empty_answer": any(_is_empty_answer(message) for message in messages),
    }
    return [name for name, true in found.items() if true]


def _is_empty_answer(message: Message) -> bool:
    learned = message["role"] == "assistant" and message.get("weight", 1) and "tool_calls" not in message
    return bool(learned) and not message["content"].strip()
