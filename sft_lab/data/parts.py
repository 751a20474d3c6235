"""The parts of a message whose content is a list: words, thoughts, calls of tools and their results."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_lab.data.tool_calls import one_or_more
from sft_lab.data.values import RowError, from_json, holds, kind, listed, text

# Types of parts, and the keys under which their value stands, the first that holds one counts.
_WORDS = {"text": ("text", "value"), "input_text": ("text",), "output_text": ("text",)}
_THOUGHTS = {"reasoning": ("reasoning", "text", "value"), "thinking": ("thinking", "text", "value")}
_CALLS = {"tool_call": ("value", "tool_call"), "tool_use": ()}
_RESULT = "tool_result"
ALLOWED = ("text", *_THOUGHTS, *_CALLS, _RESULT)
# Beside the value itself, what is read of a part.
_READ = {"tool_call": {"id", "name", "arguments"}, "tool_use": {"id", "name", "input"}}


@dataclass
class Parts:
    """What the parts of one message say.

    words: of all text parts, put together as chat templates do it, with nothing in between.  thought: likewise.
    calls: as `tool_calls` takes them.  results: messages of the role tool.
    """

    words: str = ""
    thought: str = ""
    calls: list[Any] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


def read_parts(content: list[Any], where: str, role: str, unread: set[str]) -> Parts:
    """What a list of parts says; names of keys that nothing reads are added to `unread`.

    Templates write thoughts before words, words before calls and results before the next question: parts in another
    order would be said in that one.

    Raises:
        RowError: naming the part, counted from 1, its type and what is allowed.
    """
    parts = Parts()
    for number, part in enumerate(content, start=1):
        here = f"{where} part {number}"
        if not isinstance(part, Mapping):
            raise RowError(f"{here} is {kind(part)} where an object was expected")
        _add(part, here, role, parts, unread)
    return parts


def _add(part: Mapping[str, Any], where: str, role: str, parts: Parts, unread: set[str]) -> None:
    type_ = part.get("type")
    if not isinstance(type_, str):
        raise RowError(f"{where} has type {reprlib.repr(type_)} (allowed: {', '.join(ALLOWED)})")
    if type_ in _WORDS:
        words, key = _value(part, _WORDS[type_], where)
        if words.strip() and parts.calls:
            raise RowError(f"{where} says words after a call of a tool (allowed: before it, or a message of their own)")
        parts.words += words
    elif type_ in _THOUGHTS:
        _require(role, "assistant", type_, where)
        if parts.words.strip() or parts.calls:
            raise RowError(f"{where} is a thought after words or calls (allowed: before them, in the same message)")
        thought, key = _value(part, _THOUGHTS[type_], where)
        parts.thought += thought
    elif type_ in _CALLS:
        _require(role, "assistant", type_, where)
        calls, key = _calls(part, type_, where)
        parts.calls += calls
    elif type_ == _RESULT:
        if role not in ("user", "tool"):
            raise RowError(f"{where} has type tool_result (allowed: on a user's or a tool's message)")
        if parts.words.strip():
            raise RowError(f"{where} is a tool's result after words (allowed: before them)")
        parts.results.append(_result(part, where, unread))
        return
    else:
        raise RowError(f"{where} has type {reprlib.repr(type_)} (allowed: {', '.join(ALLOWED)})")
    left = part.keys() - {"type", key} - _READ.get(type_, set())
    unread.update(f"content.{name}" for name in left if holds(part[name]))


def _require(role: str, allowed: str, type_: str, where: str) -> None:
    if role != allowed:
        raise RowError(f"{where} has type {type_} (allowed: on an {allowed}'s message)")


def _value(part: Mapping[str, Any], keys: tuple[str, ...], where: str) -> tuple[str, str]:
    """The text of a part, or of the text parts in it, and the key under which it stands."""
    key = next((key for key in keys if part.get(key) is not None), None)
    if key is None:
        raise RowError(f"{where} has no text under {' or '.join(keys)} (it has {listed(part)})")
    value = part[key]
    if isinstance(value, list):  # as Magistral has its thoughts
        return read_parts(value, f"{where}: {key}", "", set()).words, key
    return text(value, f"{where}: {key}"), key


def _calls(part: Mapping[str, Any], type_: str, where: str) -> tuple[list[Any], str]:
    if type_ == "tool_use":
        return [{"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}], ""
    key = next((key for key in _CALLS[type_] if holds(part.get(key))), None)
    if key is None:
        return [{name: part[name] for name in ("id", "name", "arguments") if name in part}], ""
    return [from_json(call, where) for call in one_or_more(part[key], f"{where}: {key}")], key


def _result(part: Mapping[str, Any], where: str, unread: set[str]) -> dict[str, Any]:
    content = part.get("content")
    if isinstance(content, list):
        content = read_parts(content, f"{where}: content", "", unread).words
    message = {"role": "tool", "content": "" if content is None else text(content, f"{where}: content")}
    ids = [key for key in ("tool_use_id", "tool_call_id") if holds(part.get(key))]
    if ids:
        message["tool_call_id"] = text(part[ids[0]], f"{where}: {ids[0]}")
    left = part.keys() - {"type", "content", *ids}
    unread.update(f"content.{name}" for name in left if holds(part[name]) and part[name] is not False)
    return message
