"""What each format makes of a row: a conversation, a plain text, or tokens that are ready."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sft_lab.data.messages import OPENAI, Conversation, Dialect, Message, conversation
from sft_lab.data.values import RowError, from_json, kind, non_empty_list, present, text

NO_LOSS = -100  # a label without loss, as in torch.nn.CrossEntropyLoss


@dataclass
class Text:
    """A plain text of which every token is learned."""

    text: str


@dataclass
class Tokens:
    """A row that is tokenised already. labels: as many, each the token's id or -100 for no loss."""

    input_ids: list[int]
    labels: list[int]


Example = Conversation | Text | Tokens


class Format(NamedTuple):
    """The columns that a row must have, what makes an example of it, and the columns that it may have."""

    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Example]
    optional: tuple[str, ...] = ()


def _messages(row: Mapping[str, Any]) -> Example:
    return conversation(non_empty_list(row["messages"], "messages"), row.get("tools"))


_SHAREGPT_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatbot", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    **OPENAI.roles,
}


def _sharegpt(row: Mapping[str, Any]) -> Example:
    said = non_empty_list(row["conversations"], "conversations")
    keys = (
        ("role", "content") if any(isinstance(m, Mapping) and present(m, "role") for m in said) else ("from", "value")
    )
    result = conversation(said, row.get("tools"), Dialect(*keys, _SHAREGPT_ROLES))
    _put_system_first(result, row.get("system"))
    return result


def _put_system_first(result: Conversation, system: Any) -> None:
    if system in (None, ""):
        return
    message = {"role": "system", "content": text(system, "system")}
    if result.messages[0] == message:
        return
    if result.messages[0]["role"] == "system":
        raise RowError("message 1 is a system message and the column system has another one")
    result.messages.insert(0, message)
    result.completion_from += 1


def _alpaca(row: Mapping[str, Any]) -> Example:
    parts = [text(row["instruction"], "instruction")]
    if row.get("input") not in (None, ""):
        parts.append(text(row["input"], "input"))
    turns = [*_history(row.get("history")), ("\n\n".join(parts), text(row["output"], "output"))]
    result = conversation([message for turn in turns for message in _question_and_answer(*turn)])
    _put_system_first(result, row.get("system"))
    return result


def _history(history: Any) -> list[tuple[str, str]]:
    """The turns before, each a list of what the user and what the assistant said."""
    if history in (None, "", []):
        return []
    turns = []
    for number, turn in enumerate(non_empty_list(history, "history"), start=1):
        if not isinstance(turn, list) or len(turn) != 2:
            given = f"a list of {len(turn)}" if isinstance(turn, list) else kind(turn)
            raise RowError(f"history {number} is {given} where a question and its answer were expected")
        turns.append((text(turn[0], f"history {number}: question"), text(turn[1], f"history {number}: answer")))
    return turns


def _question_and_answer(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompt_completion(row: Mapping[str, Any]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return conversation(_question_and_answer(prompt, completion), row.get("tools"))
    if isinstance(prompt, list) and isinstance(completion, list):
        return conversation([*prompt, *completion], row.get("tools"), prompt=len(prompt))
    given = f"prompt is {kind(prompt)} and completion is {kind(completion)}"
    raise RowError(f"{given} (allowed: two texts, or two lists of messages)")


def _qa(row: Mapping[str, Any]) -> Example:
    return conversation(_question_and_answer(text(row["question"], "question"), text(row["answer"], "answer")))


def _plain_text(row: Mapping[str, Any]) -> Example:
    if not text(row["text"], "text").strip():
        raise RowError("text is blank, so there is nothing to learn from it")
    return Text(row["text"])


_MASKS = ("completion_mask", "assistant_masks")


def _tokens(row: Mapping[str, Any]) -> Example:
    ids = non_empty_list(row["input_ids"], "input_ids")
    for i, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < 2**31:  # bool is an int, too
            raise RowError(f"input_ids[{i}] is {reprlib.repr(token)} (allowed: whole numbers from 0 to 2147483647)")
    labels = list(ids)
    for i, label in enumerate(_as_many(row, "labels", ids)):
        if label not in (NO_LOSS, ids[i]):
            raise RowError(
                f"labels[{i}] is {reprlib.repr(label)} where input_ids[{i}] is {ids[i]} (allowed: that, -100)"
            )
        labels[i] = NO_LOSS if label == NO_LOSS else ids[i]
    for column in _MASKS:  # where there are several, a token is learned that all of them allow, as in TRL
        for i, learned in enumerate(_as_many(row, column, ids)):
            if learned not in (0, 1):
                raise RowError(f"{column}[{i}] is {reprlib.repr(learned)} (allowed: 0, 1)")
            labels[i] = labels[i] if learned else NO_LOSS
    if 0 in _as_many(row, "attention_mask", ids):
        raise RowError("attention_mask has a 0: a padded row is not taken, give the tokens without padding")
    if all(label == NO_LOSS for label in labels):
        raise RowError("every label is -100, so there is nothing to learn from it")
    return Tokens(list(ids), labels)


def _as_many(row: Mapping[str, Any], column: str, ids: list[int]) -> list[Any]:
    """An optional column with a value for each token; empty where the row has none."""
    if row.get(column) in (None, ""):
        return []
    values = from_json(row[column], column)
    if not isinstance(values, list) or len(values) != len(ids):
        given = f"has {len(values)} entries" if isinstance(values, list) else f"is {kind(values)}"
        raise RowError(f"{column} {given} where a list of {len(ids)} was expected, as many as input_ids")
    return values


# In the order in which `auto` tries them. A row with tokens was made ready by its author, as TRL has it, too; a plain
# text is often what a conversation beside it was rendered to.
FORMATS: dict[str, Format] = {
    "tokens": Format(("input_ids",), _tokens, ("labels", *_MASKS, "attention_mask")),
    "messages": Format(("messages",), _messages, ("tools",)),
    "sharegpt": Format(("conversations",), _sharegpt, ("tools", "system")),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion, ("tools",)),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "system", "history")),
    "question_answer": Format(("question", "answer"), _qa),
    "text": Format(("text",), _plain_text),
}
