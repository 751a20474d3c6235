"""Where the assistant speaks in a rendered conversation: from the end of the prompt to the end of its turn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError

from sft_lab.data.formats import Message, RowError
from sft_lab.data.template import PROBE, Template, is_marked, render

Span = tuple[int, int]  # characters of the rendered text: where the words begin, and where their end token stops
_ASK: Message = {"role": "user", "content": "?"}
_ANSWER: Message = {"role": "assistant", "content": PROBE}


class _Marks(NamedTuple):
    """How the ranges that a template marks as generated lie to what the model writes, measured once on a probe.

    TRL's templates mark the header's line break too, or what follows the end of the turn, or leave that end out.

    prompt: the text that makes the assistant speak, or how it ends.
    lead: characters from the mark's start to the end of the prompt.  tail: characters from the end of the turn to the
    mark's end. Either may be negative.
    """

    prompt: str
    lead: int
    tail: int


@dataclass(frozen=True, eq=False)
class Renderer:
    """A template with a tokenizer's special tokens, and what of it is the same in every row."""

    template: Template
    variables: dict[str, str]

    def render(self, messages: list[Message], tools: Any = None, prompt: bool = False) -> tuple[str, list[Span]]:
        """A conversation as text, and the ranges that the template marks as generated.

        Raises:
            RowError: the template refuses it.
        """
        try:
            return render(self.template.text, self.variables, messages, tools, prompt, self._marked)
        except (TemplateError, TypeError) as error:
            raise RowError(f"the chat template refuses this conversation ({error})") from None

    def spans(self, messages: list[Message], tools: Any, turns: list[int], text: str, marked: list[Span]) -> list[Span]:
        """The span of each message of `turns` in `text`, which is the conversation rendered, with its marks.

        Marks are taken where they are one for each assistant message, stand behind a prompt, hold the words and close
        with the end of the turn. Else the template is asked for the prompt of that turn, and its end is searched for.

        Raises:
            RowError: where a turn lies cannot be proven.
        """
        assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        by_mark = self._by_marks(text, marked) if marked else []
        known = dict(zip(assistant, by_mark, strict=True)) if len(by_mark) == len(assistant) else {}
        return [
            known[i]
            if i in known and self._holds(text, known[i], messages[i])
            else self._searched(messages, tools, i, text)
            for i in turns
        ]

    @cached_property
    def probe(self) -> tuple[str, str, list[Span]]:
        """The text up to where the assistant would speak, and with its answer."""
        return self.render([_ASK], prompt=True)[0], *self.render([_ASK, _ANSWER])

    @cached_property
    def unwritten(self) -> set[str]:
        """Which of calls, definitions and results of tools the template passes over in silence."""
        tool = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": {}}}
        call = {"id": "abcdefghi", "type": "function", "function": {"name": PROBE, "arguments": {}}}
        other = {**call, "function": {"name": "f", "arguments": {}}}
        result = {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": PROBE}
        probes: dict[str, tuple[list[Message], Any]] = {
            "definitions": ([_ASK], [tool]),
            "calls": ([_ASK, {"role": "assistant", "content": "", "tool_calls": [call]}], None),
            "results": ([_ASK, {"role": "assistant", "content": "", "tool_calls": [other]}, result], None),
        }
        return {what for what, probe in probes.items() if not self._may_write(*probe)}

    def _may_write(self, messages: list[Message], tools: Any) -> bool:
        try:
            return PROBE in self.render(messages, tools)[0]
        except RowError:  # no silence
            return True

    # ------------------------------------------------------------------------------------------------------ by marks

    @cached_property
    def _marked(self) -> bool:
        return is_marked(self.template.text)

    @property
    def _end(self) -> str:
        return self.template.turn_end.token

    @cached_property
    def _marks(self) -> _Marks | None:
        before, text, ranges = self.probe
        silent, _ = self.render([_ASK])
        around = [(a, b) for a, b in ranges if PROBE in text[a:b]]
        if len(around) != 1:
            return None
        ((start, stop),) = around
        end = text.find(self._end, text.rindex(PROBE)) + len(self._end)
        return _Marks(before[_shared(before, silent) :], len(before) - start, stop - end)

    def _by_marks(self, text: str, marked: list[Span]) -> list[Span]:
        if self._marks is None:
            return []
        prompt, lead, tail = self._marks
        spans = [(start + lead, stop - tail) for start, stop in marked]
        return [span for span in spans if text[max(span[0] - len(prompt), 0) : span[0]] == prompt]

    def _holds(self, text: str, span: Span, message: Message) -> bool:
        stop = span[1] - len(self._end)
        return text.startswith(self._end, stop) and text.find(_words(message), span[0], stop) >= 0

    # ----------------------------------------------------------------------------------------------------- by search

    def _searched(self, messages: list[Message], tools: Any, i: int, text: str) -> Span:
        start = self._start(messages, tools, i, text)
        words = _words(messages[i])
        if self._end in str(messages[i].get("tool_calls")):
            raise RowError(f"a tool call has {self._end} in it, so where its turn ends cannot be told")
        limit = self._next_words(messages, tools, i, text)
        place = text.find(words, start, limit)
        if place < 0:
            raise RowError("the chat template leaves out or rewrites what an assistant turn says")
        stop = text.find(self._end, place + len(words), limit)
        if stop < 0:
            raise RowError(f"an assistant turn does not end in {self._end} after its words")
        return start, stop + len(self._end)

    def _start(self, messages: list[Message], tools: Any, i: int, text: str) -> int:
        """Where the template's prompt for turn i ends in the rendered conversation."""
        if i == 0:  # nothing to prompt after: the header is what the template writes before a probe, but for what it
            # also writes between prompt and words, a space or an empty thought
            alone, _ = self.render([_ANSWER], tools)
            asked, answered, _ = self.probe
            own = answered[len(asked) : answered.index(PROBE)] if answered.startswith(asked) else ""
            before = alone[: alone.find(PROBE)].removesuffix(own)
            if PROBE not in alone or not text.startswith(before):
                raise RowError(
                    "begins with the assistant, and what the template writes before its words cannot be told from them"
                )
            return len(before)
        before, _ = self.render(messages[:i], tools, prompt=True)
        if not text.startswith(before):
            raise RowError(
                "the chat template renders what comes before an assistant turn differently once it is there "
                f"(the model is asked with {before[-40:]!r}, the row has {text[: len(before)][-40:]!r})"
            )
        return len(before)

    def _next_words(self, messages: list[Message], tools: Any, i: int, text: str) -> int:
        """Where the words of the message after turn i begin, seen by changing them; the turn must end before.

        Not every turn ends alike: a template may close earlier ones, or calls of tools, with a token of their own.
        """
        if i + 1 == len(messages):
            return len(text)
        after = {**messages[i + 1], "content": PROBE + messages[i + 1]["content"]}
        changed, _ = self.render([*messages[: i + 1], after, *messages[i + 2 :]], tools)
        if changed == text:
            raise RowError("the chat template leaves out what comes after an assistant turn")
        return _shared(text, changed)


@lru_cache(maxsize=8)
def renderer(tokenizer: Any, template: Template) -> Renderer:
    return Renderer(template, tokenizer.special_tokens_map)


def _shared(a: str, b: str) -> int:
    """How many characters they have in common at the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def loses_thought(text: str, span: Span, message: Message) -> bool:
    """Whether the template leaves out what the assistant thinks before its answer, as some do in earlier turns."""
    thought = message["content"].rpartition("</think>")[0].rpartition("<think>")[2].strip()
    return thought not in text[slice(*span)]


def _words(message: Message) -> str:
    """What any template writes of an assistant's content: some trim it, and some write its thought their own way."""
    return message["content"].rpartition("</think>")[2].strip()
