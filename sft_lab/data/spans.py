"""Where the assistant speaks in a rendered conversation: from the end of the prompt to the end of its turn.

The prompt is what the model is asked with once it is used: the chat template's rendering of all that comes before the
turn. It is compared with what stands before the turn in the row, and where the two differ the row says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError

from sft_lab.data import rendering
from sft_lab.data.messages import Message
from sft_lab.data.rendering import ANSWER, ASK, PROBE, TOOL, Form, Span, call, is_marked, render, result
from sft_lab.data.template import Template, TurnEnd, known_ends, marker_pattern
from sft_lab.data.values import RowError

_WAYS = (
    "allowed: data.on_context_mismatch=split, which trains each turn behind its own prompt; chat_template.kwargs; "
    "answers that begin as the prompt asks for, such as with a thought; or another chat_template"
)
_MANY_TURNS = 8  # in a row of more, turns that stand in the same surroundings are compared with the prompt only twice
_SHAPES = 10_000  # kinds of conversations that a process remembers
_SENTINEL = "sftlabqz{}zq"  # letters and digits, so that templates that write JSON or trim leave it alone


class ContextError(RowError):
    """A turn that is not rendered as it is when it is the last, so that it could only be trained apart."""


class Place(NamedTuple):
    """Where the words of a message stand; not `exact` where the template spells them in another way, as JSON does."""

    start: int
    stop: int
    exact: bool


@dataclass(frozen=True)
class Marks:
    """How the ranges that a template marks as generated lie to the prompt, measured once on a probe.

    TRL's templates mark the header too, or its line break.
    header: the text that makes the assistant speak, or how it ends.
    lead: characters from the mark's start to the end of the prompt; may be negative.
    """

    header: str
    lead: int


class Renderer:
    """A template with a tokenizer's tokens, and what of it is the same in every row."""

    def __init__(self, tokenizer: Any, template: Template, variables: Mapping[str, Any]):
        self.template = template
        self.text = rendering.with_date(template.text, template.date)
        self.asking = rendering.with_date(template.asking or template.text, template.date)
        self.variables = {**tokenizer.special_tokens_map, **json.loads(template.variables), **variables}
        self.markers = marker_pattern(tokenizer)
        self.ends = known_ends(tokenizer) | {end.token for end in (template.turn_end, template.call_end) if end}
        self.shapes: dict[Hashable, tuple[bool, tuple[int, ...]]] = {}

    @cached_property
    def form(self) -> Form:
        return self._form(self.text)

    @cached_property
    def _asking_form(self) -> Form:
        return self._form(self.asking)

    def _form(self, text: str) -> Form:
        try:
            return rendering.form_of(text, self.variables)
        except TemplateError as error:
            raise _refused(error) from None

    @cached_property
    def reads(self) -> set[str]:
        """Names of the variables that it takes from outside."""
        return rendering.reads(self.text) | rendering.reads(self.asking)

    @cached_property
    def marked(self) -> bool:
        return is_marked(self.text)

    def render(self, messages: list[Message], tools: Any = None, marks: bool = False) -> tuple[str, list[Span]]:
        """A conversation as text to train on, and the ranges that the template marks as generated.

        Raises:
            RowError: the template refuses it.
        """
        try:
            return render(self.text, self.variables, self.form.encoded(messages), tools, marks=marks and self.marked)
        except TemplateError as error:
            raise _refused(error) from None

    def prompt(self, messages: list[Message], tools: Any = None) -> str:
        """What the model is asked with after `messages`.

        Raises:
            RowError: the template refuses them.
        """
        try:
            return render(self.asking, self.variables, self._asking_form.encoded(messages), tools, prompt=True)[0]
        except TemplateError as error:
            raise _refused(error) from None

    @cached_property
    def probe(self) -> tuple[str, str, list[Span]]:
        """The text up to where the assistant would speak, and with its answer."""
        return self.prompt([ASK]), *self.render([ASK, ANSWER], marks=True)

    @cached_property
    def own(self) -> str:
        """What the template writes between the prompt and an answer: a space, an empty thought; often nothing."""
        asked, answered, _ = self.probe
        return answered[len(asked) : answered.index(PROBE)] if answered.startswith(asked) else ""

    @cached_property
    def marks(self) -> Marks | None:
        before, text, ranges = self.probe
        around = [(start, stop) for start, stop in joined(ranges) if PROBE in text[start:stop]]
        if len(around) != 1:
            return None
        silent, _ = self.render([ASK])
        return Marks(before[_shared(before, silent) :], len(before) - around[0][0])

    @cached_property
    def unwritten(self) -> set[str]:
        """Which of calls, definitions and results of tools the template passes over in silence."""
        probes: dict[str, tuple[list[Message], Any]] = {
            "definitions": ([ASK], [TOOL]),
            "calls": ([ASK, call(PROBE)], None),
            "results": ([ASK, call(), result()], None),
        }
        return {what for what, probe in probes.items() if not self._may_write(*probe)}

    @cached_property
    def writes_system(self) -> bool:
        """Whether a system prompt is written at all; its words alone may stand in a header, or in a question, too."""
        return self._may_write([{"role": "system", "content": PROBE}, ASK, {**ANSWER, "content": "!"}], None)

    def _may_write(self, messages: list[Message], tools: Any) -> bool:
        try:
            return PROBE in self.render(messages, tools)[0]
        except RowError:  # no silence
            return True

    @cached_property
    def tested(self) -> re.Pattern[str]:
        """What the templates look for in words, and do something else where they find it."""
        words = rendering.tested_words(self.text) | rendering.tested_words(self.asking)
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or r"(?!)")

    def shape(self, messages: list[Message], tools: Any, turns: list[int]) -> Hashable:
        """All of a conversation that a template's decisions can depend on, whatever the words are."""
        contents = [message["content"] for message in messages]
        alike = tuple(map(contents.index, contents)) if len(set(contents)) < len(contents) else ()
        return tuple(map(self._kind, messages)), alike, bool(tools), tuple(turns)

    def _kind(self, message: Message) -> Hashable:
        content, thought = message["content"], message.get("reasoning_content", "")
        found = frozenset(self.tested.findall(content))
        more = frozenset(self.tested.findall(thought)) if thought else None
        calls = len(message.get("tool_calls", ()))
        return message["role"], *_edges(content), *_edges(thought), calls, "name" in message, found, more


def _edges(text: str) -> tuple[bool, bool, bool]:
    return bool(text.strip()), text[:1].isspace(), text[-1:].isspace()


@lru_cache(maxsize=64)
def renderer(tokenizer: Any, template: Template, tools: bool = False, variables: str = "{}") -> Renderer:
    """Args:
    tools: whether the conversation has some.  variables: what its row gives the template, as JSON.
    """
    return Renderer(tokenizer, template.for_tools() if tools else template, json.loads(variables))


class Row:
    """A conversation as the text that trains, and where in it each message stands.

    Raises:
        RowError: the template refuses the conversation.
    """

    def __init__(self, rows: Renderer, messages: list[Message], tools: Any = None):
        self.rows, self.tools = rows, tools
        self.messages = rows.form.placed(messages)
        self.text, marked = rows.render(self.messages, tools, marks=True)
        self._assistant = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        ranges = joined(marked)
        self._marks = dict(zip(self._assistant, ranges, strict=True)) if len(ranges) == len(self._assistant) else {}

    # ------------------------------------------------------------------------------------------------ what it holds

    def require_words(self) -> None:
        """
        Raises:
            RowError: the template leaves out what the system, the user or a tool says.
        """
        if self.messages[0]["role"] == "system" and self.messages[0]["content"].strip() and not self.rows.writes_system:
            raise _left_out(0, "system")
        place = 0
        for message in self.messages:
            words = message["content"].strip()
            if message["role"] == "assistant" or not words:
                continue
            found = self.text.find(words, place)
            if found < 0:  # another order, another spelling, or not there
                break
            place = found + len(words)
        else:
            return
        for i, message in enumerate(self.messages):
            if message["role"] != "assistant" and message["content"].strip() and self.layout[i] is None:
                raise _left_out(i, message["role"])

    @cached_property
    def layout(self) -> list[Place | None]:
        """Where the words of each message stand, seen by writing a sentinel into each: linear in the turns.

        None for words that the template leaves out, or writes in several places, and for a message without words.
        """
        for share in (2, 3):
            if (found := self._laid_out(share)) is not None:
                return found
        return [None] * len(self.messages)

    def _laid_out(self, share: int) -> list[Place | None] | None:
        """With the sentinel behind the first half or third of the words; None where it changes what is written."""
        base = next(base for n in range(10_000) if (base := _SENTINEL.format(f"{n}x")) not in self.text)[:-2]
        marked, cuts = [], {}
        for i, message in enumerate(self.messages):
            words = _words(message)
            if words:
                content = message["content"]
                cuts[i] = self._cut(words, -(-len(words) // share))
                cut = content.rindex(words) + cuts[i]
                message = {**message, "content": f"{content[:cut]}{base}{i}zq{content[cut:]}"}
            marked.append(message)
        try:
            text, _ = self.rows.render(marked, self.tools)
        except RowError:
            return None
        places: list[Place | None] = [None] * len(marked)
        seen, removed = set(), 0
        sentinel = re.compile(re.escape(base) + r"(\d+)zq")
        for match in sentinel.finditer(text):
            i, place = int(match[1]), match.start() - removed
            removed += len(match[0])
            words, start = _words(self.messages[i]), place - cuts[i]
            exact = self.text.startswith(words, max(start, 0))
            found = Place(start, start + len(words), True) if exact else Place(place, place, False)
            places[i] = None if i in seen and self.messages[i]["role"] == "assistant" else places[i] or found
            seen.add(i)
        return places if sentinel.sub("", text) == self.text else None

    def _cut(self, words: str, place: int) -> int:
        """Where a sentinel can stand: not inside of what the template looks for."""
        return next((m.end() for m in self.rows.tested.finditer(words) if m.start() < place < m.end()), place)

    # ------------------------------------------------------------------------------------------- where turns lie

    def spans(self, turns: list[int]) -> tuple[list[Span], bool]:
        """The span of each message of `turns`, and whether what stands before one is not what the model is asked with.

        Raises:
            RowError: where a turn lies cannot be proven.
        """
        shape = self.rows.shape(self.messages, self.tools, turns) if self._marks and len(turns) <= _MANY_TURNS else None
        known = self.rows.shapes.get(shape) if shape is not None else None
        starts: dict[int, int] = {}
        if known is not None:
            differs, leads = known
            starts = {i: self._marks[i][0] + lead for i, lead in zip(turns, leads, strict=True)}
        else:
            starts, differs = self._starts(turns)
            if shape is not None and len(self.rows.shapes) < _SHAPES:
                self.rows.shapes[shape] = differs, tuple(starts[i] - self._marks[i][0] for i in turns)
        return [(starts[i], self._stop(i, starts[i])) for i in turns], differs

    def apart(self, i: int) -> tuple[str, Span]:
        """Turn i, the last, behind the prompt that the model is asked with, and its span in that text.

        Raises:
            RowError: as `spans` does.
        """
        ((start, stop),), _ = self.spans([i])
        if i == 0:
            return self.text, (start, stop)
        prompt = self.rows.prompt(self.messages[:i], self.tools)
        return prompt + self.text[start:], (len(prompt), len(prompt) + stop - start)

    def _starts(self, turns: list[int]) -> tuple[dict[int, int], bool]:
        """Where the prompt of each turn ends, and whether any prompt is another one than the row has."""
        starts, differs = {}, False
        compared: dict[Hashable, list[int]] = {}  # by surroundings, where in them turns begin
        for i in turns:
            around = self._surroundings(i) if len(turns) > _MANY_TURNS else None
            before = self.layout[i - 1] if around is not None else None
            alike = compared.setdefault(around, []) if before is not None else []
            if before is not None and len(alike) > 1 and i != turns[-1] and len(set(alike)) == 1:
                starts[i] = before.stop + alike[0]
                continue
            starts[i], other = self._start(i)
            differs |= other
            if before is not None:
                alike.append(starts[i] - before.stop)
        return starts, differs

    def _surroundings(self, i: int) -> Hashable:
        """What stands around a turn: the roles beside it and the text between its words and theirs; None if unknown."""
        before, here = self.layout[i - 1] if i else None, self.layout[i]
        after = self.layout[i + 1] if i + 1 < len(self.messages) else Place(len(self.text), len(self.text), True)
        if before is None or here is None or after is None or not (before.exact and here.exact and after.exact):
            return None
        kinds = tuple(self.rows._kind(message) for message in self.messages[i - 1 : i + 2])
        return kinds, self.text[before.stop : here.start], self.text[here.stop : after.start]

    def _start(self, i: int) -> tuple[int, bool]:
        """Where the prompt of turn i ends, and whether it is another one than the row has."""
        if i == 0:
            return self._start_of_all(), False
        prompt = self.rows.prompt(self.messages[:i], self.tools)
        if self.text.startswith(prompt) and (i not in self._marks or len(prompt) <= self._marks[i][1]):
            return len(prompt), False
        start = self._start_by_marks(i)
        if start is None:
            start = self._start_by_header(i)
        if start is not None:
            return start, True
        raise ContextError(
            "the chat template renders what comes before an assistant turn differently once it is there "
            f"(the model is asked with {prompt[-40:]!r}, the row has {self.text[: len(prompt)][-40:]!r}; {_WAYS})"
        )

    def _start_of_all(self) -> int:
        """Of a conversation that begins with the assistant: no prompt ends there.

        The header is what the template writes before a probe, but for what it writes between prompt and words.
        """
        alone, _ = self.rows.render([ANSWER], self.tools)
        before = alone[: alone.find(PROBE)].removesuffix(self.rows.own)
        if PROBE not in alone or not self.text.startswith(before):
            raise RowError(
                "begins with the assistant, and what the template writes before its words cannot be told from them"
            )
        return len(before)

    def _start_by_marks(self, i: int) -> int | None:
        marks = self.rows.marks
        if marks is None or i not in self._marks:
            return None
        start = self._marks[i][0] + marks.lead
        return start if self.text[max(start - len(marks.header), 0) : start] == marks.header else None

    def _start_by_header(self, i: int) -> int | None:
        """By the text that makes the assistant speak, behind the words of the message before."""
        before, here = self.layout[i - 1], self.layout[i]
        header = self._header
        if before is None or here is None or not header:
            return None
        found = self.text.find(header, before.stop, here.start)
        return found + len(header) if found >= 0 else None

    @property
    def _header(self) -> str:
        asked = self.rows.probe[0]
        return asked[_shared(asked, self.rows.render([ASK])[0]) :]

    # ----------------------------------------------------------------------------------------------- where turns end

    def _stop(self, i: int, start: int) -> int:
        """Where the token that ends turn i stops."""
        calls = "tool_calls" in self.messages[i]
        end = self.rows.template.call_end if calls and self.rows.template.call_end else self.rows.template.turn_end
        if i in self._marks:
            return self._stop_by_marks(i, start, None if calls else end)
        if calls and end.token in json.dumps(self.messages[i]["tool_calls"], ensure_ascii=False):
            raise RowError(f"a tool call has {end.token} in it, so where its turn ends cannot be told")
        limit = self._next_words(i)
        words = self._end_of_words(i, start, limit)
        found = self.text.find(end.text, words, limit)
        if found >= 0:
            return found + len(end.text)
        for marker in self.rows.markers.finditer(self.text, words, limit):
            if marker[0] in self.rows.ends:
                return marker.end()
        raise _endless(end)

    def _stop_by_marks(self, i: int, start: int, end: TurnEnd | None) -> int:
        """What the template marks closes with the end of the turn, unless that stands right behind.

        end: what ends an answer; behind it some templates mark what ends the whole text. None: of calls the last token.
        """
        limit = self._marks[i][1]
        words = self._end_of_words(i, start, limit)
        found = self.text.find(end.text, words, limit) if end else -1
        if end and found >= 0:
            return found + len(end.text)
        if markers := [*self.rows.markers.finditer(self.text, words, limit)]:
            return markers[-1].end()
        behind = self.rows.markers.search(self.text, limit)
        if behind and behind[0] in self.rows.ends and not self.text[limit : behind.start()].strip():
            return behind.end()
        raise _endless(end or self.rows.template.turn_end)

    def _end_of_words(self, i: int, start: int, limit: int) -> int:
        """Where the words of turn i end; its calls, which follow, are not among them.

        Raises:
            RowError: the template leaves them out or rewrites them.
        """
        words, thoughts = _words(self.messages[i]), thoughts_of(self.messages[i])
        if not words:
            behind = self.text.find(thoughts[0], start, limit) if thoughts else -1
            return behind + len(thoughts[0]) if behind >= 0 else start
        if not thoughts and self.text.startswith(self.rows.own + words, start):
            return start + len(self.rows.own) + len(words)
        if (place := self.layout[i]) is None or not place.exact or place.start < start:
            raise RowError("the chat template leaves out or rewrites what an assistant turn says")
        return place.stop

    def _next_words(self, i: int) -> int:
        """Where the words of the message after turn i begin; the turn must end before.

        Not every turn ends alike: a template may close earlier ones, or calls of tools, with a token of their own.
        """
        if i + 1 == len(self.messages):
            return len(self.text)
        after = self.messages[i + 1]
        if _words(after):
            if (place := self.layout[i + 1]) is None:
                raise RowError("the chat template leaves out what comes after an assistant turn")
            return place.start
        spoken = {**after, "content": after["content"] + PROBE}
        changed, _ = self.rows.render([*self.messages[: i + 1], spoken, *self.messages[i + 2 :]], self.tools)
        return _shared(self.text, changed)


def joined(ranges: list[Span]) -> list[Span]:
    """The ranges that are not empty, those that touch as one: a template may mark words and their end apart."""
    found: list[Span] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def thoughts_of(message: Message) -> list[str]:
    """What an assistant thinks before it answers, in the content or beside it."""
    inside = message["content"].rpartition("</think>")[0].rpartition("<think>")[2]
    return [thought.strip() for thought in (message.get("reasoning_content", ""), inside) if thought.strip()]


def _shared(a: str, b: str) -> int:
    """How many characters they have in common at the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _words(message: Message) -> str:
    """What any template writes of a content: some trim it, and some write an assistant's thought their own way."""
    content = message["content"]
    return (content.rpartition("</think>")[2] if message["role"] == "assistant" else content).strip()


def _left_out(i: int, role: str) -> RowError:
    return RowError(
        f"the chat template leaves out what message {i + 1} ({role}) says "
        "(allowed: a chat_template that writes it, or a row without it)"
    )


def _endless(end: TurnEnd) -> RowError:
    return ContextError(
        f"an assistant turn does not end in {end.token} after its words "
        "(allowed: data.on_context_mismatch=split or data.loss=last_turn, where the last turn does)"
    )


def _refused(error: TemplateError) -> RowError:
    return RowError(f"the chat template refuses this conversation ({error})")
