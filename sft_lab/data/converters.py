"""What each format makes of a row: a conversation, a plain text, or tokens that are ready."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sft_lab.data.messages import OPENAI, Conversation, Dialect, Message, conversation
from sft_lab.data.tool_calls import declared
from sft_lab.data.values import RowError, from_json, holds, json_object, kind, non_empty_list, present, text

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
    """The columns that a row must have, what makes an example of it, and the columns that it may have.

    convert: of a row, and the keys of its messages that count as absent.
    """

    columns: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], frozenset[str]], Example]
    optional: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------- conversations

# What every conversation may have beside its messages; the first of each name that holds a value counts.
_SYSTEM = ("system", "system_prompt", "system_message")
_TOOLS = ("tools", "functions")
_KWARGS, _THINKING = "chat_template_kwargs", "enable_thinking"  # TRL reads the first, verl the second
BESIDE = (*_TOOLS, *_SYSTEM, _KWARGS, _THINKING)
_BESIDE = frozenset(BESIDE)  # quicker to compare a row with
_NO_VARIABLES = {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"}


def _chat(
    row: Mapping[str, Any],
    ignored: frozenset[str],
    messages: list[Any],
    dialect: Dialect = OPENAI,
    prompt: int | None = None,
) -> Conversation:
    """The conversation of these messages and of what the row has beside them."""
    result = conversation(messages, None, dialect, prompt, ignored)
    if not _BESIDE.isdisjoint(row):
        name, tools = _one_of(row, _TOOLS)
        result.tools = declared(tools, name)
        _put_system_first(result, *_one_of(row, _SYSTEM))
        result.template_kwargs = _template_kwargs(row)
    return result


def _one_of(row: Mapping[str, Any], names: tuple[str, ...]) -> tuple[str, Any]:
    """The column of these that holds a value, and the value.

    Raises:
        RowError: two of them hold different ones.
    """
    found = {name: row[name] for name in names if holds(row.get(name))}
    for name in list(found)[1:]:
        if found[name] != next(iter(found.values())):
            raise RowError(f"{' and '.join(found)} hold different values (allowed: one of them, or the same)")
    return next(iter(found.items()), (names[0], None))


def _put_system_first(result: Conversation, name: str, system: Any) -> None:
    if system is None:
        return
    words, first = text(system, name), result.messages[0]
    if first["role"] == "system":
        if first["content"] != words:
            raise RowError(f"message 1 is a system message and the column {name} has another one")
        return
    result.messages.insert(0, {"role": "system", "content": words})
    result.completion_from += 1


def _template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the chat template that the row sets."""
    kwargs = json_object(row[_KWARGS], _KWARGS) if row.get(_KWARGS) not in (None, "") else {}
    if wrong := sorted(_NO_VARIABLES & kwargs.keys()):
        raise RowError(f"{_KWARGS} sets {', '.join(wrong)} (allowed: variables of the chat template's own)")
    thinking = row.get(_THINKING)
    if thinking in (None, ""):
        return kwargs
    if not isinstance(thinking, bool):
        raise RowError(f"{_THINKING} is {reprlib.repr(thinking)} (allowed: true, false)")
    if kwargs.setdefault(_THINKING, thinking) != thinking:
        raise RowError(f"{_THINKING} is {thinking} and {_KWARGS} has another one")
    return kwargs


def _messages(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    return _chat(row, ignored, non_empty_list(row["messages"], "messages"))


_SHAREGPT_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatbot", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
    **OPENAI.roles,
}


def _sharegpt(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    said = non_empty_list(row["conversations"], "conversations")
    return _chat(row, ignored, said, _sharegpt_dialect(said))


def _sharegpt_dialect(said: list[Any]) -> Dialect:
    roles = any(isinstance(message, Mapping) and present(message, "role") for message in said)
    return Dialect(*(("role", "content") if roles else ("from", "value")), _SHAREGPT_ROLES)


def _alpaca(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    parts = [text(row["instruction"], "instruction")]
    if row.get("input") not in (None, ""):
        parts.append(text(row["input"], "input"))
    turns = [*_history(row.get("history")), ("\n\n".join(parts), text(row["output"], "output"))]
    return _chat(row, ignored, [message for turn in turns for message in _question_and_answer(*turn)])


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


def _prompt_completion(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _chat(row, ignored, _question_and_answer(prompt, completion))
    if isinstance(prompt, list) and isinstance(completion, list | Mapping | str):
        shared = any(isinstance(message, Mapping) and present(message, "from") for message in prompt)
        dialect = _sharegpt_dialect(prompt) if shared else OPENAI
        if isinstance(completion, str):
            completion = {dialect.role: "assistant", dialect.content: completion}
        answers = completion if isinstance(completion, list) else [completion]  # one alone, as preference data has it
        return _chat(row, ignored, [*prompt, *answers], dialect, len(prompt))
    given = f"prompt is {kind(prompt)} and completion is {kind(completion)}"
    raise RowError(f"{given} (allowed: two texts, two lists of messages, a list and one answer)")


def _qa(row: Mapping[str, Any], ignored: frozenset[str]) -> Example:
    said = _question_and_answer(text(row["question"], "question"), text(row["answer"], "answer"))
    return _chat(row, ignored, said)


# ------------------------------------------------------------------------------------------------- texts and tokens


def _plain_text(row: Mapping[str, Any], _: frozenset[str]) -> Example:
    if not text(row["text"], "text").strip():
        raise RowError("text is blank, so there is nothing to learn from it")
    return Text(row["text"])


_MASKS = ("completion_mask", "assistant_masks", "loss_mask")


def _tokens(row: Mapping[str, Any], _: frozenset[str]) -> Example:
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
    "messages": Format(("messages",), _messages, BESIDE),
    "sharegpt": Format(("conversations",), _sharegpt, BESIDE),
    "prompt_completion": Format(("prompt", "completion"), _prompt_completion, BESIDE),
    "alpaca": Format(("instruction", "output"), _alpaca, ("input", "history", *BESIDE)),
    "question_answer": Format(("question", "answer"), _qa, BESIDE),
    "text": Format(("text",), _plain_text),
}
