"""From chat messages to tokens and labels: the loss is on what the assistant says, its end of turn included."""

from __future__ import annotations

from typing import Any

from sft_lab.data.formats import Message, RowError
from sft_lab.data.template import TurnEnd

_PROBE = "sft-lab-probe"
IGNORE = -100  # a label without loss, as in torch.nn.CrossEntropyLoss


def tokenize(tokenizer: Any, messages: list[Message], turn_end: TurnEnd) -> dict[str, list[int]]:
    """`input_ids` and `labels`, two lists of the same length; labels are -100 outside the assistant's turns.

    The spans are found in the rendered text and carried over by character offsets, so that no token is trained that
    the model does not itself write, and none of those that it must write is left out.

    Raises:
        RowError: the template refuses the conversation, or where its assistant turns lie cannot be proven.
    """
    text, spans = _assistant_spans(tokenizer, messages, turn_end)
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except TypeError:  # what tokenizers raises for half of a surrogate pair
        raise RowError("no valid Unicode, it has half of a surrogate pair") from None
    input_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORE] * len(input_ids)
    for start, end in spans:
        # A token of white space may have an empty range, where a tokenizer trims offsets.
        inside = [i for i, (a, b) in enumerate(offsets) if start <= a and b <= end and (a < b or a > start)]
        if not inside or input_ids[inside[-1]] != turn_end.id:
            raise RowError(f"the end of an assistant turn ({turn_end.token}) would not be trained")
        for i in inside:
            labels[i] = input_ids[i]
    labels[0] = IGNORE  # nothing comes before it that could predict it, and packing would put another row there
    return {"input_ids": input_ids, "labels": labels}


def prompt_and_reference(tokenizer: Any, messages: list[Message]) -> tuple[list[int], str]:
    """Tokens of everything before the last assistant turn, ready for generation, and that turn's text.

    Raises:
        RowError: nothing comes before it.
    """
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if last == 0:
        raise RowError("nothing comes before the answer, so there is nothing to ask")
    text = _render(tokenizer, messages[:last], add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"], messages[last]["content"]


def _render(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise RowError(f"the chat template refuses this conversation ({error})") from None


def _assistant_spans(tokenizer: Any, messages: list[Message], turn_end: TurnEnd) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text and, for each assistant turn, where its words begin and its end token stops."""
    text = _render(tokenizer, messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    starts = [_turn_start(tokenizer, messages, i, text) for i in turns]
    spans = []
    for i, start, limit in zip(turns, starts, [*starts[1:], len(text)], strict=True):
        words = messages[i]["content"].strip()  # some templates trim, some put an empty thought before the words
        place = text.find(words, start, limit)
        end = text.find(turn_end.token, place + len(words), limit) if place >= 0 else -1
        if end < 0:
            raise RowError(f"an assistant turn does not end in {turn_end.token} after its words")
        if messages[i].get("weight", 1):
            spans.append((start, end + len(turn_end.token)))
    return text, spans


def _turn_start(tokenizer: Any, messages: list[Message], i: int, text: str) -> int:
    """Where the template's generation prompt for turn i ends in the rendered conversation."""
    if i == 0:  # nothing to prompt after: the header is what the template writes before the words of a probe
        alone = _render(tokenizer, [{"role": "assistant", "content": _PROBE}])
        before = alone[: alone.find(_PROBE)]
        if _PROBE not in alone or not text.startswith(before):
            raise RowError(
                "begins with the assistant, and what the template writes before its words cannot be told from them"
            )
        return len(before)
    before = _render(tokenizer, messages[:i], add_generation_prompt=True)
    if not text.startswith(before):
        raise RowError("the chat template renders what comes before an assistant turn differently once it is there")
    return len(before)
