"""From an example to tokens and labels: the loss is on what the assistant says, its end of turn included."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from sft_lab.data.formats import Conversation, Example, Message, RowError, Text, Tokens
from sft_lab.data.rendering import Span
from sft_lab.data.spans import Renderer, Row, renderer, thoughts_of
from sft_lab.data.template import Template, puts_bos

IGNORE = -100  # a label without loss, as in torch.nn.CrossEntropyLoss


@dataclass
class Encoded:
    """Tokens and labels, two lists of the same length; labels are -100 where there is no loss, as on the first token.

    notes: those of the example, and text, double_bos, no_bos, extra_eos, special_tokens_in_text, thought (one is
    learned), thought_left_out, thought_in_words, context_differs, other_turn_end, unknown_token, untrained_turn_end and
    prompt_tokens_differ where they hold. context_differs: what stands before a learned turn is not the prompt that the
    model is asked with. other_turn_end: a learned turn ends with a token at which an answer does not stop, because
    another message follows. prompt_tokens_differ: a prompt alone is cut into other tokens than where words follow. A
    header that ends in a space does so, or in two line breaks with a vocabulary such as GPT-2's, and words that begin
    with a line break do.
    turns: of a conversation, the role of each message and whether it is learned.
    apart: whether it is one turn of a conversation, behind its own prompt.
    """

    input_ids: list[int]
    labels: list[int]
    notes: list[str] = field(default_factory=list)
    turns: list[tuple[str, bool]] = field(default_factory=list)
    apart: bool = False


def encode(tokenizer: Any, example: Example, template: Template, loss: str, apart: bool = False) -> Encoded:
    """The tokens of an example, and which of them are learned.

    The spans of a conversation are found in the rendered text and carried over by character offsets, so that no token
    is trained that the model does not itself write, and none of those that it must write is left out.

    loss: assistant (each of its turns of weight 1), completion (those of the completion), last_turn (the assistant's
    last message) or all (every token). Tokens keep the labels that they have.
    apart: the last turn behind the prompt that the model is asked with, whatever the row has before it.

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
        encoded = _conversation(tokenizer, example, template, loss, facts, apart)
    encoded.labels[0] = IGNORE  # nothing comes before it that could predict it, and packing would put another row there
    if encoded.input_ids[:2] == [facts.bos] * 2:
        encoded.notes.append("double_bos")
    if facts.puts_bos and encoded.input_ids[0] != facts.bos:
        encoded.notes.append("no_bos")
    if facts.unknown in encoded.labels:
        encoded.notes.append("unknown_token")
    return encoded


def prompt_and_reference(tokenizer: Any, conversation: Conversation, template: Template) -> tuple[list[int], str]:
    """Tokens of everything before the last assistant turn, ready for generation, and what is to be answered.

    The prompt is rendered with the template that the model is asked with. The answer is all that the model has to
    write: what stands between the prompt and the end of the turn, be it written by the template, decoded as an answer
    is.

    Raises:
        RowError: nothing comes before that turn, or the template refuses it.
    """
    last = max(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
    if last == 0:
        raise RowError("nothing comes before the answer, so there is nothing to ask")
    rows = _renderer(tokenizer, template, conversation)
    row = Row(rows, conversation.messages[: last + 1], conversation.tools or None)
    prompt = rows.prompt(row.messages[:last], row.tools)
    ((start, stop),), _ = row.spans([last])
    ends = [marker for marker in rows.markers.finditer(row.text, start, stop) if marker.end() == stop]
    if not ends:
        raise RowError("the token that ends the answer cannot be told from its words")
    end = ends[-1]
    ids, answer = (
        _tokenized(tokenizer, text, add_special_tokens=False)["input_ids"]
        for text in (prompt, row.text[start : end.start()])
    )
    return ids, decoded(tokenizer, answer)


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """An answer as text without special tokens, but for the one that ends a thought, as </think>."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    for end in _THOUGHT_ENDS:
        if end in text and any(token in tokenizer.added_tokens_encoder for token in _SPECIAL.findall(end)):
            thought, _, words = text.rpartition(end)
            parts = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (thought, words))
            return "</think>".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


# What ends a thought by a special token, in Cohere's, Gemma's, Mistral's and OpenAI's templates.
_THOUGHT_ENDS = ("<|channel|>final<|message|>", "<|END_THINKING|>", "<channel|>", "[/THINK]")
_SPECIAL = re.compile(r"<[^<>]+>|\[/?[A-Z]+\]")


def _renderer(tokenizer: Any, template: Template, conversation: Conversation) -> Renderer:
    variables = json.dumps(conversation.template_kwargs, sort_keys=True) if conversation.template_kwargs else "{}"
    return renderer(tokenizer, template, bool(conversation.tools), variables)


def by_turn(tokenizer: Any, conversation: Conversation, template: Template, loss: str) -> list[Encoded]:
    """A row for each turn that `loss` learns: the prompt that the model is asked with, and that turn as it then ends.

    Raises:
        RowError: as `encode` does.
    """
    turns = [_up_to(conversation, i) for i in _learned(conversation, loss)]
    return [encode(tokenizer, turn, template, loss, apart=True) for turn in turns]


def _up_to(conversation: Conversation, last: int) -> Conversation:
    earlier: list[Message] = [
        {**message, "weight": 0} if message["role"] == "assistant" else message
        for message in conversation.messages[:last]
    ]
    return replace(
        conversation,
        messages=[*earlier, conversation.messages[last]],
        completion_from=min(conversation.completion_from, last),
    )


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

    eos: what a plain text ends with.  ends: tokens that end a turn or a text.  markers: all that stand for one text.
    vocabulary: how many tokens there are.  unknown: the one for what the vocabulary lacks.
    prompt_differs: in a probe, see `Encoded`.
    """

    bos: int | None
    puts_bos: bool
    eos: int
    ends: frozenset[int]
    markers: frozenset[int]
    vocabulary: int
    unknown: int | None
    specials: re.Pattern[str]
    prompt_differs: bool


@lru_cache(maxsize=8)
def _facts(tokenizer: Any, template: Template) -> _Facts:
    end = template.turn_end
    eos = end.id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ends = frozenset({*template.ends, eos})
    asked, answered, _ = renderer(tokenizer, template).probe
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, answered)]
    specials = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {end.token}
    unknown = tokenizer.unk_token_id  # in some vocabularies it is one of the others, too
    return _Facts(
        bos=tokenizer.bos_token_id,
        puts_bos=puts_bos(tokenizer),
        eos=eos,
        ends=ends,
        markers=ends | frozenset(tokenizer.added_tokens_decoder),
        vocabulary=len(tokenizer),
        unknown=None if unknown in {*ends, tokenizer.bos_token_id} else unknown,
        specials=re.compile("|".join(map(re.escape, sorted(specials)))),
        prompt_differs=answered.startswith(asked) and ids[1][: len(ids[0])] != ids[0],
    )


def _conversation(
    tokenizer: Any, conversation: Conversation, template: Template, loss: str, facts: _Facts, apart: bool
) -> Encoded:
    learned = _learned(conversation, loss)
    if not learned:
        raise RowError(f"no assistant turn to learn with loss={loss}")
    rows = _renderer(tokenizer, template, conversation)
    row = Row(rows, conversation.messages, conversation.tools or None)
    _check_tools(rows, conversation, row.text)
    row.require_words()
    text, spans, differs = row.text, list[Span](), False
    if apart:
        text, span = row.apart(learned[-1])
        spans = [span]
    elif loss != "all":
        spans, differs = row.spans(learned)
    tokens = _tokenized(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tokens["input_ids"]
    labels, shared = _labels(ids, tokens["offset_mapping"], spans, facts.markers)
    stops = [ids[bisect_left(tokens["offset_mapping"], (stop, stop)) - 1] for _, stop in spans]
    notes = {
        "special_tokens_in_text": any(map(facts.specials.search, _said(row.messages))),
        "extra_eos": template.turn_end.token * 2 in text,
        "context_differs": differs,
        "other_turn_end": not facts.ends.issuperset(stops),
        "prompt_tokens_differ": facts.prompt_differs or shared,
        "template_kwargs_unread": not conversation.template_kwargs.keys() <= rows.reads,
        **_thoughts(row, text, learned, spans),
    }
    return Encoded(
        input_ids=ids,
        labels=[*ids] if loss == "all" else labels,
        notes=[*conversation.notes, *(name for name, holds in notes.items() if holds)],
        turns=[(m["role"], loss == "all" or i in learned) for i, m in enumerate(row.messages)],
        apart=apart,
    )


def _said(messages: list[Message]) -> list[str]:
    """Every text of the messages that stands in the row."""
    said = [message["content"] for message in messages]
    said += [message["reasoning_content"] for message in messages if "reasoning_content" in message]
    return said + [json.dumps(message["tool_calls"]) for message in messages if "tool_calls" in message]


def _thoughts(row: Row, text: str, learned: list[int], spans: list[Span]) -> dict[str, bool]:
    """What becomes of the thoughts of learned turns; with loss=all a turn's span is the whole text."""
    spans = spans or [(0, len(text))] * len(learned)
    thoughts = [(thoughts_of(row.messages[i]), span) for i, span in zip(learned, spans, strict=True)]
    lost = [not all(one in text[slice(*span)] for one in thought) for thought, span in thoughts if thought]
    return {
        "thought": not all(lost),
        "thought_left_out": any(lost),
        "thought_in_words": row.rows.form.tags_are_words
        and any("<think>" in row.messages[i]["content"] for i in learned),
    }


def _labels(ids: list[int], offsets: list[Span], spans: list[Span], ends: frozenset[int]) -> tuple[list[int], bool]:
    """The ids of the tokens that lie within the spans, and whether a token reaches from a header into the words.

    Raises:
        RowError: the last token of a span is none of `ends`.
    """
    labels, shared = [IGNORE] * len(ids), False
    for start, stop in spans:
        # A token that begins in the header is none that the model writes. One of white space may have an empty range,
        # behind it, where a tokenizer trims offsets. Some end tokens take in the white space that follows.
        first, after = bisect_left(offsets, (start, start + 1)), bisect_left(offsets, (stop, stop))
        if first == after or ids[after - 1] not in ends:
            raise RowError("the token that ends an assistant turn would not be trained")
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
            raise RowError(
                f"the chat template writes no tool {what} (chat_template=qwen does; of a model's own templates the one "
                "named tool_use is taken)"
            )


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
