"""In what runs differ: which config keys, and which of those move together."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft_lab.checks import is_open

if TYPE_CHECKING:
    from sft_lab.sweep.records import Record


def differing(records: Sequence[Record]) -> list[str]:
    """The config keys whose values differ, in the order of the config.

    A key that a run lacks counts only in a mapping of free names such as peft.extra, where it means "not set".
    Elsewhere the run is of an older version, whose value nobody knows.
    """
    keys = dict.fromkeys(key for record in records for key in record.config)
    return [key for key in keys if differs(records, key)]


def differs(records: Sequence[Record], key: str) -> bool:
    known = [record for record in records if record.config and (is_open(key) or key in record.config)]
    return len({shown(record.config.get(key)) for record in known}) > 1


def shown(value: Any) -> str:
    """A config's value as a person types it: 0.0002, true, [q_proj, v_proj]; empty for none."""
    if value is None:
        return ""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return json.dumps(value) if isinstance(value, bool) else str(value)


def tied(records: Sequence[Record], keys: Sequence[str]) -> dict[str, list[str]]:
    """The keys that vary by themselves, each with those that are a one-to-one copy of it, as lora_alpha of r.

    Where every run has another value, any two keys go one to one: there they are tied only if they are equal numbers,
    or proportional ones in three runs and more.
    """
    own: dict[str, list[str]] = {}
    for key in keys:
        original = next((other for other in own if _copies(records, other, key)), None)
        if original is None:
            own[key] = []
        else:
            own[original].append(key)
    return own


def _copies(records: Sequence[Record], first: str, second: str) -> bool:
    pairs: list[tuple[Any, Any]] = [(r.config.get(first), r.config.get(second)) for r in records if r.config]
    distinct = {(shown(a), shown(b)) for a, b in pairs}
    if len({a for a, _ in distinct}) != len(distinct) or len({b for _, b in distinct}) != len(distinct):
        return False
    if len(distinct) < len(pairs):
        return True
    if not all(is_number(value) for pair in pairs for value in pair):
        return False
    (a, b), *others = pairs
    proportional = all(math.isclose(a * other_b, b * other_a) for other_a, other_b in others)
    return all(a == b for a, b in pairs) or (len(pairs) > 2 and proportional)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
