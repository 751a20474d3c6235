"""Chat messages as the rest of sft_lab takes them, made of those in a row, or the reason why they cannot be trained on.

A message is `{"role": ..., "content": ...}` with role system, user, assistant or tool and a text as content. It may
have `"weight": 0` (no loss on it), an assistant's also `tool_calls` and `reasoning_content`, a tool's also `name` and
`tool_call_id`.
Null stands for absent wherever a key is optional. Inside the arguments of a call and the parameters of a tool nulls are
data and stay; those that Arrow writes there for what is absent are gone by now (`columnar_files`).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from sft_lab.data.parts import Parts, read_parts
from sft_lab.data.switches import SWITCHES, asks, check_unread, learned
from sft_lab.data.tool_calls import calls_of, declared, one_or_more, tool_calls
from sft_lab.data.values import RowError, holds, kind, listed, nearest, present, text

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
    unread: names of the messages' keys that hold a value and that nothing reads.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    completion_from: int = 0
    notes: list[str] = field(default_factory=list)
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)


class Dialect(NamedTuple):
    """How a data set writes messages: its two keys, and its names of the roles with ours."""

    role: str
    content: str
    roles: Mapping[str, str]


# `developer` is the newer models' name of system, `function` the first API's name of tool.
OPENAI = Dialect("role", "content", {**{role: role for role in ROLES}, "developer": "system", "function": "tool"})


def conversation(
    messages: list[Any],
    tools: Any = None,
    dialect: Dialect = OPENAI,
    prompt: int | None = None,
    ignored: frozenset[str] = frozenset(),
) -> Conversation:
    """A conversation of a row's messages, of which the first `prompt` are given to the model and not learned.

    ignored: keys of messages that count as absent.

    Raises:
        RowError: naming the message, counted from 1, that cannot be taken.
    """
    clean: list[Message] = []
    unread: set[str] = set()
    given = None
    asked = False  # for loss on a turn that is not the assistant's
    for number, message in enumerate(messages, start=1):
        if number - 1 == prompt:
            given = len(clean)
        if ignored and isinstance(message, Mapping):
            message = {key: value for key, value in message.items() if key not in ignored}
        taken, asks_loss = _taken(message, f"message {number}", dialect, unread)
        clean += taken
        asked |= asks_loss
    given = len(clean) if prompt == len(messages) else given
    for message in clean[:given] if given else []:
        if message["role"] == "assistant":
            message["weight"] = 0
    _check_order(clean)
    _check_learned(clean, prompt)
    start = _completion_start(clean) if given is None else given
    notes = _notes(clean) + ["asks_for_loss"] * asked
    return Conversation(clean, declared(tools), start, notes, unread=unread)


def _taken(message: Any, where: str, dialect: Dialect, unread: set[str]) -> tuple[list[Message], bool]:
    """A message as one of ours, behind the results of tools that it brings; and whether it asks for loss in vain."""
    if not isinstance(message, Mapping):
        raise RowError(f"{where} is {kind(message)} where an object was expected")
    for key in (dialect.role, dialect.content):
        if key not in message and not (key == dialect.content and calls_of(message)):
            raise RowError(f"{where} has no {key!r} (it has {listed(message)}{nearest(key, message)})")
    name, content = message[dialect.role], message.get(dialect.content)
    role = dialect.roles.get(name) if isinstance(name, str) else None
    if role is None:
        hint = f"{', '.join(dialect.roles)}{nearest(name, dialect.roles)}"
        raise RowError(f"{where} has {dialect.role} {reprlib.repr(name)} (allowed: {hint})")
    if len(message) == 2 and isinstance(content, str) and name != "function_call":  # as nearly all are
        return [{"role": role, "content": content}], False
    said = f"{where}: {dialect.content}"
    parts = read_parts(content, said, role, unread) if isinstance(content, list) else Parts()
    calls = [*one_or_more(content, f"{where}: {name}")] if name == "function_call" else calls_of(message)
    if calls and parts.calls:
        raise RowError(f"{where} has calls of tools in its parts and beside them (allowed: in one place)")
    calls = calls or parts.calls
    read = {dialect.role, dialect.content, "tool_calls", "function_call", *SWITCHES, *_OF_ROLE.get(role, ())}
    if left := message.keys() - read:
        thought = bool(parts.thought) or any(holds(message.get(key)) for key in _THOUGHTS)
        unread.update(check_unread(message, left, role, where, thought))
    if isinstance(content, list) or name == "function_call" or (content is None and calls):
        words = parts.words
    else:
        words = text(content, said)
    clean: Message = {"role": role, "content": words}
    learn = learned(message, where)
    if learn is False:
        clean["weight"] = 0
    if calls:
        if role != "assistant":
            raise RowError(f"{where} has tool_calls (allowed: on an assistant's)")
        clean["tool_calls"] = tool_calls(calls, where, unread)
    _add_what_the_role_has(clean, message, parts.thought, where)
    if parts.results and role == "tool" and words.strip():
        raise RowError(f"{said} has a tool_result and words beside it (allowed: one of them)")
    kept = [] if parts.results and not words.strip() else [clean]
    return [*parts.results, *kept], learn is True and role != "assistant" and asks(message)


_OF_ROLE = {"assistant": _THOUGHTS, "tool": ("name", "tool_call_id")}


def _add_what_the_role_has(clean: Message, message: Mapping[str, Any], thought: str, where: str) -> None:
    if clean["role"] == "tool":
        for key in _OF_ROLE["tool"]:
            if present(message, key):
                clean[key] = text(message[key], f"{where}: {key}")
    if clean["role"] != "assistant":
        return
    thoughts = {"its parts": thought} if thought else {}
    for key in _THOUGHTS:
        if holds(message.get(key)):
            thoughts[key] = text(message[key], f"{where}: reasoning_content")
    if len(set(thoughts.values())) > 1:
        raise RowError(f"{where} has different thoughts in {' and '.join(thoughts)} (allowed: one, or the same)")
    if thoughts:
        clean["reasoning_content"] = next(iter(thoughts.values()))


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
