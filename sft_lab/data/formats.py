"""From one row of a data set to chat messages, or the reason why not.

A message is `{"role": ..., "content": ...}`; roles are system, user, assistant and tool. `"weight": 0` keeps the loss
off an assistant message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, Any]


class RowError(ValueError):
    """Why a row cannot be trained on; the caller adds file and row number."""


def detect(row: Mapping[str, Any]) -> str:
    """The format of a row by its columns.

    Raises:
        RowError: no format has these columns.
    """
    for name, (columns, _) in FORMATS.items():
        if all(column in row for column in columns):
            return name
    wanted = "; ".join(f"{name}: {', '.join(columns)}" for name, (columns, _) in FORMATS.items())
    raise RowError(f"columns {', '.join(map(str, row)) or '(none)'} fit no format ({wanted})")


def to_messages(row: Any, format_name: str = "auto") -> list[Message]:
    """Validated chat messages of a row.

    Raises:
        RowError: the row is no mapping, lacks a column, or its conversation cannot be trained on.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a {_kind(row)} where an object was expected")
    name = detect(row) if format_name == "auto" else format_name
    columns, convert = FORMATS[name]
    for column in columns:
        if column not in row:
            raise RowError(f"no column {column!r} (format {name} has {', '.join(columns)})")
    return _validated(convert(row))


def _messages(row: Mapping[str, Any]) -> Any:
    value = row["messages"]
    if not isinstance(value, str):
        return value
    try:  # a .csv cell
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowError(f"messages is a text that is no JSON ({error})") from None


def _prompt_completion(row: Mapping[str, Any]) -> Any:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # only the completion is learned
        return [{**m, "weight": 0} if _is_assistant(m) else m for m in prompt] + completion
    return [
        {"role": "user", "content": _text(prompt, "prompt")},
        {"role": "assistant", "content": _text(completion, "completion")},
    ]


def _is_assistant(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "assistant"


def _alpaca(row: Mapping[str, Any]) -> Any:
    parts = [_text(row["instruction"], "instruction")]
    if row.get("input"):
        parts.append(_text(row["input"], "input"))
    messages = [
        {"role": "user", "content": "\n\n".join(parts)},
        {"role": "assistant", "content": _text(row["output"], "output")},
    ]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": _text(row["system"], "system")})
    return messages


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Any]]] = {
    "messages": (("messages",), _messages),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
}


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{column} is {_kind(value)} where a text was expected")
    return value


def _validated(messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise RowError(f"messages is {_kind(messages)} where a list was expected")
    if not messages:
        raise RowError("messages is empty")
    clean = [_validated_message(message, number) for number, message in enumerate(messages, start=1)]
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in clean):
        raise RowError("no assistant turn, so there is nothing to learn from it")
    return clean


def _validated_message(message: Any, number: int) -> Message:
    where = f"message {number}"
    if not isinstance(message, Mapping):
        raise RowError(f"{where} is {_kind(message)} where an object was expected")
    for key in ("role", "content"):
        if key not in message:
            raise RowError(f"{where} has no {key!r}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise RowError(f"{where} has role {role!r} (allowed: {', '.join(ROLES)})")
    if not isinstance(content, str):
        raise RowError(f"{where}: content is {_kind(content)} where a text was expected")
    if message.get("tool_calls"):
        raise RowError(f"{where} has tool_calls, which would be lost")
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise RowError(f"{where} has weight {weight!r} (allowed: 0, 1)")
    return {"role": role, "content": content, **({} if weight else {"weight": 0})}


def _kind(value: Any) -> str:
    return (
        "null" if value is None else {"dict": "object", "str": "text"}.get(type(value).__name__, type(value).__name__)
    )
