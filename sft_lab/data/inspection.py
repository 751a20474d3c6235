"""Which prepared rows to look at, and what they look like: the trainer's own tokens, with everything known of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from sft_lab.data.batches import TrainingRows
from sft_lab.data.prepared import Prepared
from sft_lab.data.view import DocumentView, RowView, tokens
from sft_lab.errors import ConfigError
from sft_lab.schema import Config

_LISTED = 20  # rows left out that the terminal shows, of each reason


def choose(data: Prepared, count: int, row: str | None = None, by_length: str | None = None) -> list[int]:
    """Indices of training rows: one by its id, or the first, longest or shortest `count`.

    Raises:
        ConfigError: no row of this id trains.
    """
    if row is not None:
        return _of_id(data, row)
    if by_length is None:
        return list(range(min(count, len(data.train))))
    order = np.argsort(data.column("length"), kind="stable")
    return (order[::-1] if by_length == "longest" else order)[:count].tolist()


def _of_id(data: Prepared, row: str) -> list[int]:
    """Rows named FILE:NUMBER, FILE:NUMBER#PART, or NUMBER; all parts of a row that was split."""
    name, _, part = row.partition("#")
    places, numbers = data.column("place"), data.column("number")
    file, _, number = name.rpartition(":")
    wanted = np.array([file in ("", place) or place.endswith(f"/{file}") for place in data.facts["places"]])
    if not number.isdecimal() or (part and not part.isdecimal()):
        raise ConfigError(f"--row={row} : no row's name (allowed: FILE:NUMBER, or NUMBER, such as {_example(data)})")
    hits = wanted[places] & (numbers == int(number))
    if part:
        hits &= data.column("part") == int(part)
    found = np.flatnonzero(hits).tolist()
    if not found:
        raise ConfigError(f"--row={row} : no such row trains{_why_not(data, wanted, int(number))}")
    return found


def _example(data: Prepared) -> str:
    return data.row_id(data.train[0])


def _why_not(data: Prepared, wanted: np.ndarray, number: int) -> str:
    """Of a row that was read, what became of it."""
    facts = data.facts
    reasons = [*facts["bad_rows"], *facts["bad_eval_rows"]]
    for kind, dropped in (("", facts["dropped_rows"]), ("held out and ", facts["dropped_eval_rows"])):
        for name, rows in dropped.items():
            if any(wanted[place] and n == number for place, n in rows):
                words = [reason for place, n, reason in reasons if wanted[place] and n == number]
                return f", it was {kind}left out ({': '.join([name, *words[:1]])})"
    held_out = zip(data.eval["place"][:], data.eval["number"][:], strict=True) if len(data.eval) else ()
    if any(wanted[place] and n == number for place, n in held_out):
        return ", it is held out"
    return f" (a row's name is like {_example(data)})"


def views(config: Config, data: Prepared, indices: list[int]) -> list[RowView]:
    """The rows as the trainer draws them: with packing, the packed rows that they stand in, neighbours and all."""
    if not config.trainer.packing:
        return [RowView(view.id, [view]) for view in (_document(data, i) for i in indices)]
    packs = TrainingRows(data.train, data.column("length"), config).packs
    assert packs is not None
    place = {row: number for number, rows in enumerate(packs) for row in rows}
    chosen = list(dict.fromkeys(place[i] for i in indices))
    return [RowView(f"packed row {number + 1}", [_document(data, i) for i in packs[number]]) for number in chosen]


def _document(data: Prepared, index: int) -> DocumentView:
    row = data.train[index]
    turns = [{"role": turn.removesuffix("+"), "trained": turn.endswith("+")} for turn in row["turns"].split()]
    notes = row["notes"].split()
    source = data.facts["places"][row["place"]]
    return DocumentView(data.row_id(row), source, tokens(data.tokenizer, row["input_ids"], row["labels"]), turns, notes)


def left_out(data: Prepared) -> dict[str, list[str]]:
    """Ids of the rows that were read and do not train as they stood, by what became of them."""
    return {
        reason: [data.named(place, number) for place, number, *_ in names]
        for facts in (data.facts["dropped_rows"], data.facts["shortened_rows"])
        for reason, names in facts.items()
    }


def left_out_lines(data: Prepared) -> list[str]:
    lines = []
    reasons: dict[tuple[int, int], Any] = {(place, n): reason for place, n, reason in data.facts["bad_rows"]}
    for reason, ids in left_out(data).items():
        more = f", and {len(ids) - _LISTED} more" if len(ids) > _LISTED else ""
        lines.append(f"{reason}: {len(ids)} rows: {', '.join(ids[:_LISTED])}{more}")
    lines += [f"  {data.named(*name)}: {reason}" for name, reason in list(reasons.items())[:_LISTED]]
    return lines
