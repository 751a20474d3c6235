"""Columns of a row that nothing reads: counted by name, or refused where a value in them changes what the row teaches.

Files that are made for other methods (DPO, KTO, vision) or other tools have the words of an SFT row and more beside
them. To train on the words alone would teach something else than the file says.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sft_lab.data.values import RowError, from_json, holds

_NAMES = 1000  # that are counted; rows may have names of their own each


@dataclass
class Unread:
    """In how many rows a name that nothing reads holds a value.

    columns, keys: by name, of rows and of messages.
    nulls: rows whose calls of tools had arguments that Arrow holds as null, which count as absent.
    """

    columns: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    nulls: int = 0

    def count(self, columns: Iterable[str], keys: Iterable[str]) -> None:
        for counts, names in ((self.columns, columns), (self.keys, keys)):
            for name in names:
                if name in counts or len(counts) < _NAMES:
                    counts[name] += 1

    def add(self, other: Unread) -> None:
        self.columns.update(other.columns)
        self.keys.update(other.keys)
        self.nulls += other.nulls


# ----------------------------------------------------------------------------- names that change what a row teaches

# Of a column that holds a value, what refuses the row: by its name, the row, the format, and the columns that are read.
_Rule = Callable[[str, Mapping[str, Any], str, Collection[str]], str | None]

_PREFERRED = ("chosen", "chosen_messages", "chosen_response", "chosen_conversations")
_REJECTED = ("rejected", "rejected_messages", "rejected_response", "rejected_conversations")
_MARKS = ("label", "kto_tag", "desirable")  # a KTO row's; `label` is a class of its own in other data
_MEDIA = (
    *("image", "images", "video", "videos", "audio", "audios", "pixel_values", "input_features"),
    *("image_path", "image_paths", "image_url", "image_urls", "img", "video_path", "audio_path"),
)
_WORDS = ("context", "contexts", "passage", "passages", "paragraph", "document", "choices", "options", "input")
_AROUND = ("prefix", "suffix", "instruction", "history", "documents", *_WORDS)
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_WEIGHTS = ("loss_weight", "loss_scale", "loss_mask", "sample_weight")
_PACKED = ("seq_lengths", "position_ids", "token_type_ids", "segment_ids", "document_ids", "cu_seqlens")
_ANSWERS = ("completion", "completions", "response", "responses", "answer", "answers", "output", "target")


def _preference(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    if any(column in read for column in _PREFERRED):  # mapped: the answer that is to be trained
        return None
    if any(holds(row.get(name)) and row[name] in _read_values(row, read) for name in _PREFERRED):
        return None  # said twice, as in UltraFeedback
    chosen = next((name for name in _PREFERRED if holds(row.get(name))), None)
    way = f"data.columns={{{_mapped(chosen, row)}}} trains the chosen answer, " if chosen else ""
    both = ",".join(name for name in (*_PREFERRED, *_REJECTED) if holds(row.get(name)))
    return f"is an answer of a preference row (DPO) that is not read (allowed: {way}{_ignoring(both)})"


def _mapped(chosen: str, row: Mapping[str, Any]) -> str:
    """The entries of data.columns by which the chosen answer is read."""
    answer = row[chosen]
    first = answer[0] if isinstance(answer, list) and answer else answer
    role = (first.get("role") or first.get("from")) if isinstance(first, Mapping) else None
    if isinstance(answer, list) and role in ("system", "user", "human", "developer"):
        return f"messages: {chosen}" if first.get("role") else f"conversations: {chosen}"
    for prompt in ("messages", "conversations"):
        if holds(row.get(prompt)) and not holds(row.get("prompt")):
            return f"prompt: {prompt}, completion: {chosen}"
    name = next((name for name in ("output", "answer") if holds(row.get(name))), "completion")
    return f"{name}: {chosen}"


def _bad_answer(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    value = row[name].strip().lower() if isinstance(row[name], str) else row[name]
    if value in ("false", "0") or (isinstance(value, bool | int | float) and value == 0):
        return f"is {row[name]!r}, which marks an answer as a bad one (KTO; allowed: true, {_ignoring(name)})"
    return None


def _media(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    if isinstance(row[name], (bool, int, float)) or row[name] in ("[]", "{}"):
        return None
    return f"holds media, which are not read: only words are learned (allowed: none, {_ignoring(name)})"


def _words(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    """Words that belong to the question, unless the question has them already."""
    value = row[name]
    if isinstance(value, bool | int | float) or _said(value, row, read):
        return None
    way = ""
    if format_ == "question_answer" and isinstance(value, str):
        way = f"data.columns={{instruction: question, input: {name}, output: answer}} puts it into the question, "
    elif format_ == "prompt_completion" and isinstance(value, str) and isinstance(row["prompt"], str):
        way = f"data.columns={{instruction: prompt, input: {name}, output: completion}} puts it into the question, "
    elif format_ == "alpaca" and "input" not in read and isinstance(value, str):
        way = f"data.columns={{input: {name}}} puts it into the question, "
    return f"holds words that format {format_} does not read (allowed: {way}{_ignoring(name)})"


def _thought(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    if not isinstance(row[name], str) or _said(row[name], row, read):
        return None
    return f"holds a thought, which is read of messages alone (allowed: reasoning_content in one, {_ignoring(name)})"


def _weight(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    if row[name] in (1, "1"):
        return None
    return f"is {reprlib.repr(row[name])}, which is not read (allowed: 1, a column weight of 0 or 1, {_ignoring(name)})"


def _switch(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    """Keys of messages, which one column would be for all of them; a number is a measurement."""
    if row[name] is not (name.lower() == "masked"):
        return None
    return f"is {row[name]}, which is read of messages alone (allowed: a column weight of 0 or 1, {_ignoring(name)})"


def _template(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    return f"is not read: one template is for all rows (allowed: chat_template=from_file, {_ignoring(name)})"


def _packed(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    """What says that a row of tokens is of several documents, whose attention would have to be kept apart."""
    try:
        value, ids = from_json(row[name], name), from_json(row["input_ids"], "input_ids")
    except RowError:
        return None  # which reading the row tells
    if not isinstance(ids, list):
        return None
    count = len(ids)
    same = {"seq_lengths": [count], "cu_seqlens": [0, count], "position_ids": list(range(count))}
    if value == same.get(name) or (name not in same and isinstance(value, list) and len(set(map(repr, value))) == 1):
        return None
    return (
        "says that the row has several documents or segments, which is not read (allowed: each as a row of its own, "
        f"trainer.packing=true packs them; {_ignoring(name)})"
    )


def _token_weights(name: str, row: Mapping[str, Any], format_: str, read: Collection[str]) -> str | None:
    return f"is not read (allowed: labels, completion_mask, {_ignoring(name)})"


def _ignoring(name: str) -> str:
    return f"data.ignore_columns=[{name}] takes {'them' if ',' in name else 'it'} for nothing"


_ANY_CHAT: dict[str, _Rule] = {
    **dict.fromkeys((*_PREFERRED, *_REJECTED), _preference),
    **dict.fromkeys(_MEDIA, _media),
    **dict.fromkeys(_WEIGHTS, _weight),
    **dict.fromkeys(("loss", "train", "training", "trainable", "masked"), _switch),
    **dict.fromkeys(_MARKS, _bad_answer),
    "chat_template": _template,
}
_LONG = {**_ANY_CHAT, **dict.fromkeys(("history", "documents"), _words)}
_SHORT = {**_ANY_CHAT, **dict.fromkeys(_AROUND, _words), **dict.fromkeys(_THOUGHTS, _thought)}
# By format, and in it by the name in lower case.
_RULES: dict[str, dict[str, _Rule]] = {
    **dict.fromkeys(("messages", "sharegpt"), _LONG),
    **dict.fromkeys(("prompt_completion", "alpaca", "question_answer"), _SHORT),  # of one question and its answer
    "text": {name: rule for name, rule in _ANY_CHAT.items() if rule in (_preference, _media, _weight, _switch)},
    "tokens": {
        **dict.fromkeys(_MEDIA, _media),
        **dict.fromkeys(_PACKED, _packed),
        **dict.fromkeys(("loss_weights", "loss_weight", "weights"), _token_weights),
    },
}


def check_columns(row: Mapping[str, Any], left: Collection[str], format_: str, read: Collection[str]) -> list[str]:
    """Those of the columns `left`, which nothing reads, that hold a value, in the row's order.

    read: the columns that the format reads, and those from which `data.columns` takes what it reads.

    Raises:
        RowError: a value changes what the row teaches.
    """
    found = [name for name in row if name in left and holds(row[name])]
    rules = _RULES[format_]
    for name in found:
        rule = rules.get(name.lower())
        reason = rule(name, row, format_, read) if rule else None
        if reason:
            raise RowError(f"column {name} {reason}")
    return found


def check_answer(row: Mapping[str, Any], format_: str, found: list[str]) -> None:
    """Of a conversation that ends with a question: that no column has its answer.

    Raises:
        RowError: one has.
    """
    for name in found:
        if name.lower() in _ANSWERS:
            prompt = "messages" if format_ == "messages" else "conversations" if format_ == "sharegpt" else "prompt"
            raise RowError(
                f"the conversation ends without an answer and column {name}, which is not read, holds one (allowed: "
                f"data.columns={{prompt: {prompt}, completion: {name}}}, {_ignoring(name)})"
            )


def preference_hint(row: Mapping[str, Any]) -> str:
    """Of a row that fits no format: how its preferred answer is trained; empty where it has none."""
    chosen = next((name for name in _PREFERRED if holds(row.get(name))), None)
    return f"; data.columns={{{_mapped(chosen, row)}}} trains the chosen answer" if chosen else ""


def _said(value: Any, row: Mapping[str, Any], read: Collection[str]) -> bool:
    """Whether all words of a value stand in what is read."""
    said = [words for other in _read_values(row, read) for words in _texts(other)]
    wanted = [words.strip() for words in _texts(value)]
    return bool(wanted) and all(any(words in other for other in said) for words in wanted)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _read_values(row: Mapping[str, Any], read: Collection[str]) -> list[Any]:
    return [row[name] for name in read if holds(row.get(name))]
