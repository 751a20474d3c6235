"""From one row of a data set to an example to train on, or the reason why not: format, column names, weight."""

from __future__ import annotations

import functools
import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from sft_lab.data.converters import FORMATS, Example, Format, Text, Tokens
from sft_lab.data.messages import Conversation, Message
from sft_lab.data.unread import Unread, check_answer, check_columns, preference_hint
from sft_lab.data.values import NullsDropped, RowError, kind, listed, nearest, present

__all__ = [
    "FORMATS",
    "FORMAT_NAMES",
    "Conversation",
    "Example",
    "Format",
    "LeftOut",
    "Message",
    "RowError",
    "Text",
    "Tokens",
    "detect",
    "possible_formats",
    "text_of",
    "to_example",
]

FORMAT_NAMES = ("auto", *FORMATS)  # what the config may choose
_WEIGHT = "weight"  # a row may have it in every format
_READ = {name: frozenset((*form.columns, *form.optional, _WEIGHT)) for name, form in FORMATS.items()}


class LeftOut(Exception):
    """A row that its own data takes out of training; the text is a reason word, such as weight_0."""


def to_example(
    row: Any,
    format_name: str = "auto",
    columns: Mapping[str, str] = {},
    ignored: frozenset[str] = frozenset(),
    unread: Unread | None = None,
) -> Example:
    """What a row says, in the format of that name, or with `auto` the first one that its columns fit.

    columns: names of a format's columns and where the row has them, a column or a dotted path such as
    `instances.0.output`. Other columns stay available under their own names.
    ignored: columns, and keys of messages, that count as absent.
    unread: where to count the columns and the keys of messages that nothing reads.

    Raises:
        RowError: the row lacks a column, or what it has cannot be trained on.
        LeftOut: the row has weight 0.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"a {kind(row)} where an object was expected")
    names = possible_formats(format_name, columns)
    padded = isinstance(row, NullsDropped)
    if columns or ignored:
        mapped = {column: _at(row, path, column) for column, path in columns.items()}
        row = {**{name: value for name, value in row.items() if name not in ignored}, **mapped}
    _check_weight(row.get(_WEIGHT))
    name = detect(row, names) if format_name == "auto" else format_name
    for column in FORMATS[name].columns:
        if column not in row:
            has = f"format {name} has {', '.join(FORMATS[name].columns)}, the row {listed(row)}"
            raise RowError(f"no column {column!r} ({has}{nearest(column, row)})")
    left = row.keys() - _READ[name]
    if columns:  # what is mapped is read where it comes from
        left -= {path if path in row else path.partition(".")[0] for path in columns.values()}
    found = check_columns(row, left, name, row.keys() - left) if left else []
    example = FORMATS[name].convert(row, ignored)
    keys: set[str] = set()
    if isinstance(example, Conversation):
        keys = example.unread
        if found and "ends_with_user" in example.notes:
            check_answer(row, name, found)
    if unread is not None and (found or keys or padded):
        unread.count(found, keys)
        unread.nulls += padded
    return example


def text_of(example: Example, system: bool = True, thoughts: bool = True) -> str:
    """All that is said, in order, as one text by which rows are compared; of tokens the ids.

    Without `system` the system message and the tools are left out: long ones that all rows share would make them all
    alike. Without `thoughts` what the assistant thinks is: the question and its answer are what gives a row away.
    """
    if isinstance(example, Tokens):
        return " ".join(map(str, example.input_ids))
    if isinstance(example, Text):
        return example.text
    said = [message for message in example.messages if system or message["role"] != "system"]
    given = [*example.tools, *filter(None, [example.template_kwargs])] if system else []
    return "\n".join([*map(_written, given), *(part for message in said for part in _parts(message, thoughts))])


def _parts(message: Message, thoughts: bool) -> list[str]:
    calls = [call["function"] for call in message.get("tool_calls", [])]  # without ids, which are often random
    said = [message.get("reasoning_content", ""), message["content"]] if thoughts else [_answer(message)]
    return [message["role"], *filter(None, said), *map(_written, calls)]


def _answer(message: Message) -> str:
    """The content without a thought in it."""
    content = message["content"]
    return (
        content.rpartition("</think>")[2].strip()
        if message["role"] == "assistant" and "</think>" in content
        else content
    )


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


# -------------------------------------------------------------------------------------------- which column is which


def possible_formats(format_name: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """The formats that have every column that is mapped; no row is needed to tell.

    Raises:
        RowError: none has.
    """
    return _possible_formats(format_name, tuple(columns))


@functools.cache  # each row asks
def _possible_formats(format_name: str, columns: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(FORMATS) if format_name == "auto" else (format_name,)
    known = {name: (*FORMATS[name].columns, *FORMATS[name].optional, _WEIGHT) for name in names}
    everything = list(dict.fromkeys(column for columns_of in known.values() for column in columns_of))
    for column in columns:
        if column not in everything:
            which = "no format has" if format_name == "auto" else f"format {format_name} has not"
            hint = f"allowed: {', '.join(everything)}{nearest(column, everything)}"
            raise RowError(f"columns maps {column!r}, which {which} ({hint})")
    fitting = tuple(name for name in names if set(columns) <= set(known[name]))
    if not fitting:
        raise RowError(f"columns maps {', '.join(columns)}, which no format has together ({_overview(names)})")
    return fitting


def detect(row: Mapping[str, Any], names: Sequence[str] = ()) -> str:
    """The first format whose columns the row has, of those named or of all.

    One with a null in them comes last: in a table of several formats every row has every column.

    Raises:
        RowError: no format has these columns.
    """
    names = names or tuple(FORMATS)
    for has in (present, lambda row, column: column in row):
        for name in names:
            if all(has(row, column) for column in FORMATS[name].columns):
                return name
    wanted = [column for name in names for column in FORMATS[name].columns if column not in row]
    hints = (nearest(column, wanted, cutoff=0.75) for column in row)  # looser, `content` would be near `conversations`
    hint = preference_hint(row) or next(filter(None, hints), "; data.columns maps other names to these")
    raise RowError(f"columns {listed(row)} fit no format ({_overview(names)}{hint})")


def _overview(names: Sequence[str]) -> str:
    return "; ".join(f"{name}: {', '.join(FORMATS[name].columns)}" for name in names)


def _at(row: Mapping[str, Any], path: str, column: str) -> Any:
    """The value at a dotted path; a column that has dots in its own name comes first."""
    if path in row:
        return row[path]
    value: Any = row
    parts = path.split(".")
    for i, part in enumerate(parts):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            place = ".".join(parts[:i]) or "the row"
            has = f"is {kind(value)}"
            if isinstance(value, Mapping):
                has = f"has {listed(value)}{nearest(part, value)}"
            elif isinstance(value, list):
                has = f"is a list of {len(value)}, counted from 0"
            raise RowError(f"no column {path!r}, which columns maps to {column!r} ({place} {has})")
    return value


def _check_weight(weight: Any) -> None:
    weight = {"0": 0, "1": 1, "": None}.get(weight, weight) if isinstance(weight, str) else weight  # .csv has texts
    if weight is None:
        return
    if weight not in (0, 1):
        raise RowError(f"weight is {reprlib.repr(weight)} (allowed: 0, which leaves the row out, and 1)")
    if weight == 0:
        raise LeftOut("weight_0")
