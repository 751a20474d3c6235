"""What a value of a row has to be, and how the reason that refuses one names it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any


class RowError(ValueError):
    """Why a row cannot be trained on; the caller adds file and row number."""


class NullsDropped(dict[str, Any]):
    """A row whose calls of tools had arguments that Arrow holds as null: absent, since it pads with them; or null."""


def text(value: Any, name: str) -> str:
    """The value itself; `name` says in the error where it stands.

    Raises:
        RowError: it is no text.
    """
    if not isinstance(value, str):
        raise RowError(f"{name} is {kind(value)} where a text was expected")
    return value


def non_empty_list(value: Any, name: str) -> list[Any]:
    """A list, or what a JSON text of one holds.

    Raises:
        RowError: it is anything else, or empty.
    """
    value = from_json(value, name)
    if not isinstance(value, list):
        raise RowError(f"{name} is {kind(value)} where a list was expected")
    if not value:
        raise RowError(f"{name} is empty")
    return value


def json_object(value: Any, name: str) -> dict[str, Any]:
    """An object, or what a JSON text of one holds, that a chat template can write as JSON.

    Raises:
        RowError: it is anything else, or holds what JSON has not: a date or bytes of a Parquet file, NaN.
    """
    value = from_json(value, name)
    if not isinstance(value, Mapping):
        raise RowError(f"{name} is {kind(value)} where an object was expected")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{name} cannot be written as JSON ({error})") from None
    return dict(value)


def from_json(value: Any, name: str) -> Any:
    """What a JSON text holds, as in a cell of a .csv file; any other value as it is.

    Raises:
        RowError: the text is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return _JSON.decode(value)
    except (ValueError, RecursionError) as error:  # ValueError: broken, NaN, or a number of thousands of digits
        raise RowError(f"{name} is a text that is no JSON ({error})") from None


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"it has {constant}")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)


def present(row: Mapping[str, Any], key: str) -> bool:
    """Whether an optional key is given: null stands for absent, as it does in rows read through Arrow."""
    return row.get(key) is not None


def holds(value: Any) -> bool:
    """Whether a value says anything: null, "" and what has nothing else inside are what Arrow and CSV pad rows with."""
    if isinstance(value, str):
        return value != ""
    if isinstance(value, dict):
        return any(map(holds, value.values()))
    if isinstance(value, list | tuple):
        return any(map(holds, value))
    return value is not None and value != b""


def kind(value: Any) -> str:
    """A value's type in the words of JSON."""
    if isinstance(value, Mapping):
        return "object"
    return "null" if value is None else "text" if isinstance(value, str) else type(value).__name__


def listed(names: Iterable[Any], most: int = 12) -> str:
    """Names as an error shows them; a table may have hundreds of columns."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(shown[:most]) + more or "(none)"


def nearest(name: Any, allowed: Iterable[Any], cutoff: float = 0.6) -> str:
    """The hint at what was probably meant, upper and lower case aside; empty where nothing is near."""
    by_lower = {str(word).lower(): str(word) for word in allowed}
    found = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=cutoff)
    return f"; did you mean {by_lower[found[0]]!r}?" if found else ""
