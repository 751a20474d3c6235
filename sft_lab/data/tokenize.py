"""From an example to tokens and labels: the loss is on what the assistant says, its end of turn included."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError

from sft_lab.data.formats import Conversation, Example, RowError, Text, Tokens
from sft_lab.data.spans import Renderer, Span, loses_thought, renderer
from sft_lab.data.template import Template, puts_bos

IGNORE = -100  # a label without loss, as in torch.nn.CrossEntropyLoss


@dataclass
class Encoded:
    """Tokens and labels, two lists of the same length; labels are -100 where there is no loss, as on the first token.

    notes: those of the example, and text, double_bos, no_bos, extra_eos, special_tokens_in_text, thought_left_out,
    untrained_turn_end and prompt_tokens_differ where they hold. The last: a prompt alone, as the model is asked with
    it, is cut into other tokens than where words follow. A header that ends in a space does so, or in two line breaks
    with a vocabulary such as GPT-2's, and words that begin with a line break do.
    turns: of a conversation, the role of each message and whether it is learned.
    """

    input_ids: list[int]
    labels: list[int]
    notes: list[str] = field(default_factory=list)
    turns: list[tuple[str, bool]] = field(default_factory=list)


def encode(tokenizer: Any, example: Example, template: Template, loss: str) -> Encoded:
    """The tokens of an example, and which of them are learned.

    The spans of a conversation are found in the rendered text and carried over by character offsets, so that no token
    is trained that the model does not itself write, and none of those that it must write is left out.

    loss: assistant (each of its turns of weight 1), completion (those of the completion), last_turn (the assistant's
    last message) or all (every token). Tokens keep the labels that they have.

    Raises:
        RowError: the template refuses the conversation or loses part of it, where its assistant turns lie cannot be
            proven, or there is nothing to learn.
    """
    facts = _facts(tokenizer, template)
    if isinstance(example, Tokens):
        encoded = _ready(example, facts)
    elif isinstance(example, Text):
        encoded = _plain(tokenizer, example, loss, facts)
    else:
        encoded = _conversation(tokenizer, example, template, loss, facts)
    encoded.labels[0] = IGNORE  # nothing comes before it that could predict it, and packing would put another row there
    if encoded.input_ids[:2] == [facts.bos] * 2:
        encoded.notes.append("double_bos")
    if facts.puts_bos and encoded.input_ids[0] != facts.bos:
        encoded.notes.append("no_bos")
    return encoded


def prompt_and_reference(tokenizer: Any, conversation: Conversation, template: Template) -> tuple[list[int], str]:
    """Tokens of everything before the last assistant turn, ready for generation, and that turn's text.

    The prompt is rendered with the tokenizer's own template, as it is when the model is used.

    Raises:
        RowError: nothing comes before that turn, or the template refuses it.
    """
    messages, tools = conversation.messages, conversation.tools
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if last == 0:
        raise RowError("nothing comes before the answer, so there is nothing to ask")
    try:
        prompt = tokenizer.apply_chat_template(
            messages[:last], tools=tools or None, tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, TypeError) as error:
        raise RowError(f"the chat template refuses this conversation ({error})") from None
    reference = messages[last]["content"]
    if "tool_calls" in messages[last]:  # as the model is to write them
        rows = renderer(tokenizer, template)
        text, marked = rows.render(messages[: last + 1], tools)
        ((start, stop),) = rows.spans(messages[: last + 1], tools, [last], text, marked)
        reference = text[start : stop - len(template.turn_end.token)]
    return _tokenized(tokenizer, prompt, add_special_tokens=False)["input_ids"], reference


def split(
    conversation: Conversation, fits: Callable[[Conversation], bool], loss: str = "assistant"
) -> list[Conversation]:
    """A long conversation in pieces: each the system prompt and as many whole exchanges, in order, as fit together.

    An exchange begins where the user speaks and lasts until the user speaks again. One that does not fit alone comes
    back by itself. A piece in which `loss` learns nothing is left out.
    """
    messages = conversation.messages
    head = int(messages[0]["role"] == "system")
    user = [message["role"] == "user" for message in messages]
    starts = [i for i in range(head + 1, len(messages)) if user[i] and not user[i - 1]]
    groups: list[list[int]] = []
    for start, stop in pairwise([head, *starts, len(messages)]):
        exchange = [*range(start, stop)]
        if groups and fits(_piece(conversation, head, groups[-1] + exchange)):
            groups[-1] += exchange
        else:
            groups.append(exchange)
    learned = set(_learned(conversation, loss))
    return [_piece(conversation, head, group) for group in groups if learned & set(group)]


def _piece(conversation: Conversation, head: int, group: list[int]) -> Conversation:
    kept = [*range(head), *group]
    return replace(
        conversation,
        messages=[conversation.messages[i] for i in kept],
        completion_from=sum(i < conversation.completion_from for i in kept),
    )


def _learned(conversation: Conversation, loss: str) -> list[int]:
    """The assistant messages that `loss` learns."""
    turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if loss == "all":
        return turns
    if loss == "last_turn":
        turns = turns[-1:]
    elif loss == "completion":
        turns = [i for i in turns if i >= conversation.completion_from]
    return [i for i in turns if conversation.messages[i].get("weight", 1)]


# ------------------------------------------------------------------------------------------------- kinds of examples


@dataclass(frozen=True)
class _Facts:
    """What of a tokenizer and a template is the same in every row.

    eos: what a plain text ends with.  ends: tokens that end a turn or a text.  vocabulary: how many tokens there are.
    prompt_differs: in a probe, see `Encoded`.
    """

    bos: int | None
    puts_bos: bool
    eos: int
    ends: frozenset[int]
    vocabulary: int
    specials: re.Pattern[str]
    prompt_differs: bool


@lru_cache(maxsize=8)
def _facts(tokenizer: Any, template: Template) -> _Facts:
    end = template.turn_end
    eos = end.id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    asked, answered, _ = renderer(tokenizer, template).probe
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, answered)]
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {end.token}
    return _Facts(
        bos=tokenizer.bos_token_id,
        puts_bos=puts_bos(tokenizer),
        eos=eos,
        ends=frozenset({end.id, eos}),
        vocabulary=len(tokenizer),
        specials=re.compile("|".join(map(re.escape, sorted(specials)))),
        prompt_differs=answered.startswith(asked) and ids[1][: len(ids[0])] != ids[0],
    )


def _conversation(tokenizer: Any, conversation: Conversation, template: Template, loss: str, facts: _Facts) -> Encoded:
    messages, learned = conversation.messages, _learned(conversation, loss)
    if not learned:
        raise RowError(f"no assistant turn to learn with loss={loss}")
    rows = renderer(tokenizer, template)
    text, marked = rows.render(messages, conversation.tools)
    _check_tools(rows, conversation, text)
    tokens = _tokenized(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tokens["input_ids"]
    spans = [] if loss == "all" else rows.spans(messages, conversation.tools, learned, text, marked)
    labels, shared = _labels(ids, tokens["offset_mapping"], spans, template)
    said = [m["content"] for m in messages] + [json.dumps(m["tool_calls"]) for m in messages if "tool_calls" in m]
    notes = {
        "special_tokens_in_text": any(map(facts.specials.search, said)),
        "extra_eos": template.turn_end.token * 2 in text,
        "thought_left_out": any(loses_thought(text, s, messages[i]) for i, s in zip(learned, spans, strict=False)),
        "prompt_tokens_differ": facts.prompt_differs or shared,
    }
    return Encoded(
        input_ids=ids,
        labels=[*ids] if loss == "all" else labels,
        notes=[*conversation.notes, *(name for name, holds in notes.items() if holds)],
        turns=[(m["role"], loss == "all" or i in learned) for i, m in enumerate(messages)],
    )


def _labels(ids: list[int], offsets: list[Span], spans: list[Span], template: Template) -> tuple[list[int], bool]:
    """The ids of the tokens that lie within the spans, and whether a token reaches from a header into the words.

    Raises:
        RowError: the last token of a span is not the end of a turn.
    """
    labels, shared = [IGNORE] * len(ids), False
    for start, stop in spans:
        # A token that begins in the header is none that the model writes. One of white space may have an empty range,
        # behind it, where a tokenizer trims offsets. Some end tokens take in the white space that follows.
        first, after = bisect_left(offsets, (start, start + 1)), bisect_left(offsets, (stop, stop))
        if first == after or ids[after - 1] != template.turn_end.id:
            raise RowError(f"the end of an assistant turn ({template.turn_end.token}) would not be trained")
        labels[first:after] = ids[first:after]
        shared |= first > 0 and offsets[first - 1][1] > start
    return labels, shared


def _check_tools(rows: Renderer, conversation: Conversation, text: str) -> None:
    names = {
        "definitions": [tool["function"]["name"] for tool in conversation.tools],
        "calls": [call["function"]["name"] for m in conversation.messages for call in m.get("tool_calls", ())],
        "results": ["" for message in conversation.messages if message["role"] == "tool"],
    }
    for what, there in names.items():
        if there and (what in rows.unwritten or not all(name in text for name in there)):
            raise RowError(f"the chat template writes no tool {what} (chat_template=qwen does)")


def _plain(tokenizer: Any, example: Text, loss: str, facts: _Facts) -> Encoded:
    if loss in ("completion", "last_turn"):
        raise RowError(f"a plain text has no turns to learn with loss={loss} (allowed: assistant, all)")
    ids = _tokenized(tokenizer, example.text)["input_ids"]
    if ids[:2] == [facts.bos] * 2:  # the text brings its own
        del ids[0]
    if ids[-1:] != [facts.eos]:
        ids.append(facts.eos)
    notes = ["text"] + ["special_tokens_in_text"] * bool(facts.specials.search(example.text))
    return Encoded(ids, [*ids], notes + _doubled(ids, facts))


def _ready(example: Tokens, facts: _Facts) -> Encoded:
    ids, labels = [*example.input_ids], [IGNORE, *example.labels[1:]]
    outside = [i for i in (min(ids), max(ids)) if not 0 <= i < facts.vocabulary]
    if outside:
        raise RowError(f"token {outside[0]} is none of the tokenizer's (allowed: 0 to {facts.vocabulary - 1})")
    open_ended = any(here not in facts.ends and here != after == IGNORE for here, after in pairwise([*labels, IGNORE]))
    return Encoded(ids, labels, ["untrained_turn_end"] * open_ended + _doubled(ids, facts))


def _doubled(ids: list[int], facts: _Facts) -> list[str]:
    return ["extra_eos"] * any(a == b and a in facts.ends for a, b in pairwise(ids))


def _tokenized(tokenizer: Any, text: str, **options: Any) -> Any:
    try:
        return tokenizer(text, return_attention_mask=False, return_token_type_ids=False, verbose=False, **options)
    except TypeError:  # what tokenizers raises for half of a surrogate pair
        raise RowError("no valid Unicode, it has half of a surrogate pair") from None
