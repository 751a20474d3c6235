"""Conversations as text by a Jinja chat template: how a template wants its messages, what it can be asked, its date."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import TemplateError, meta, nodes

from sft_lab.data.messages import Message

Span = tuple[int, int]  # characters of the rendered text: the first, and one past the last
PROBE = "sft-lab-probe"  # words that no template writes by itself
THOUGHT = "sft-lab-thought"
ASK: Message = {"role": "user", "content": "?"}
ANSWER: Message = {"role": "assistant", "content": PROBE}
TOOL = {"type": "function", "function": {"name": PROBE, "description": "", "parameters": {}}}
CALL_ID = "abcdefghi"  # nine letters, which Mistral's templates ask for


def call(name: str = "f", **arguments: str) -> Message:
    """An assistant message that calls one tool and says nothing."""
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": CALL_ID, "type": "function", "function": function}],
    }


def result(words: str = PROBE) -> Message:
    return {"role": "tool", "name": "f", "tool_call_id": CALL_ID, "content": words}


def render(
    text: str,
    variables: Mapping[str, Any],
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    prompt: bool = False,
    marks: bool = False,
) -> tuple[str, list[Span]]:
    """A conversation in the template `text`, and with `marks` the ranges of characters that it marks as generated.

    As `apply_chat_template` does it, without choosing a template and tokenising on the way.
    variables: the tokenizer's `special_tokens_map` and what else the template reads.  prompt: end with what makes the
    assistant speak.

    Raises:
        TemplateError: the template refuses the conversation, or fails on it in any other way.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered, ranges = render_jinja_template(
            [messages],
            tools=tools or None,  # to some templates an empty list is a list of tools
            chat_template=text,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=marks,
            **variables,
        )
    except (TemplateError, RecursionError):
        raise
    except Exception as error:  # a template is code that comes with a model or from a user: it may raise anything
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    return rendered[0], ranges[0] if marks else []


def is_marked(text: str) -> bool:
    """Whether the template says what the assistant generates."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text) is not None


# ------------------------------------------------------------------------------------------ how it wants its messages


@dataclass(frozen=True)
class Form:
    """What a template expects of a message where templates differ.

    parts: content as a list of parts, as templates of vision models do.
    arguments_text: the arguments of a call as JSON text, where others take an object.
    null_content: null as the content of a message that only calls tools, where others take an empty text.
    moves_thoughts: it has a place of its own for `reasoning_content`, and takes `<think>` in the content for words.
    tags_are_words: it writes thoughts in another way than with `<think>`, if only in turns that call tools.
    tags_thoughts: it has no place for `reasoning_content`, and asks for a thought with `<think>`.
    """

    parts: bool = False
    arguments_text: bool = False
    null_content: bool = False
    moves_thoughts: bool = False
    tags_are_words: bool = False
    tags_thoughts: bool = False

    def placed(self, messages: list[Message]) -> list[Message]:
        """The messages with their thoughts where this template writes them: beside the content, or before it."""
        if self.moves_thoughts:
            return [_with_thought(message) for message in messages]
        return [_with_tags(message) for message in messages] if self.tags_thoughts else messages

    def encoded(self, messages: list[Message]) -> list[Message]:
        """The messages as the template is given them."""
        if not (self.parts or self.arguments_text or self.null_content):
            return messages
        return [self._encoded(message) for message in messages]

    def _encoded(self, message: Message) -> Message:
        made = dict(message)
        if "tool_calls" in message and self.arguments_text:
            made["tool_calls"] = [_with_text(one) for one in message["tool_calls"]]
        if "tool_calls" in message and self.null_content and not message["content"]:
            made["content"] = None
        elif self.parts:
            made["content"] = [{"type": "text", "text": message["content"]}]
        return made


def _with_thought(message: Message) -> Message:
    content = message["content"]
    opened, _, rest = content.partition("<think>")
    thought, closed, words = rest.partition("</think>")
    if message["role"] != "assistant" or opened.strip() or not closed or message.get("reasoning_content"):
        return message
    made = {**message, "content": words.lstrip("\n")}
    return {**made, "reasoning_content": thought.strip("\n")} if thought.strip() else made


def _with_tags(message: Message) -> Message:
    thought, content = message.get("reasoning_content", ""), message["content"]
    if not thought or "</think>" in content:
        return message
    made = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**made, "content": f"<think>\n{thought}\n</think>\n\n{content}"}


def _with_text(one: dict[str, Any]) -> dict[str, Any]:
    function = one["function"]
    return {**one, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def form_of(text: str, variables: Mapping[str, Any]) -> Form:
    """The form in which a template writes what it is given, tried on short conversations.

    Raises:
        TemplateError: it writes no answer in any form; what it said of the plain one.
    """
    parts = _parts(text, variables)
    calls = [Form(parts, arguments, null) for null in (False, True) for arguments in (False, True)]
    form = next(
        (one for one in calls if _writes(text, variables, one, [ASK, call(PROBE, x=PROBE)], PROBE, 2)), calls[0]
    )
    beside = _tried(text, variables, form, [ASK, {**ANSWER, "reasoning_content": THOUGHT}]) or ""
    before = (
        _tried(text, variables, form, [ASK, {**ANSWER, "content": f"<think>\n{THOUGHT}\n</think>\n\n{PROBE}"}]) or ""
    )
    calling = _tried(text, variables, form, [ASK, {**call(x=PROBE), "reasoning_content": THOUGHT}]) or ""
    asked = _tried(text, variables, form, [ASK], prompt=True) or ""
    moves = THOUGHT in beside and beside != before
    return replace(
        form,
        moves_thoughts=moves,
        tags_are_words=moves or (THOUGHT in calling and "<think>" not in calling),
        tags_thoughts=THOUGHT in before and THOUGHT not in beside and asked.rstrip().endswith("<think>"),
    )


def _parts(text: str, variables: Mapping[str, Any]) -> bool:
    problem: TemplateError | None = None
    for parts in (False, True):
        try:
            if PROBE in render(text, variables, Form(parts).encoded([ASK, ANSWER]))[0]:
                return parts
        except TemplateError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return False


def _tried(
    text: str, variables: Mapping[str, Any], form: Form, messages: list[Message], prompt: bool = False
) -> str | None:
    try:
        return render(text, variables, form.encoded(messages), prompt=prompt)[0]
    except TemplateError:
        return None


def _writes(
    text: str, variables: Mapping[str, Any], form: Form, messages: list[Message], words: str, times: int
) -> bool:
    return (_tried(text, variables, form, messages) or "").count(words) >= times


# -------------------------------------------------------------------------------------------------- what stands in it


@lru_cache(maxsize=64)
def _parsed(text: str) -> nodes.Template:
    """The template's syntax tree; its marks, which are tags of Transformers' own, are left out."""
    plain = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{#\1 \2#}", text)
    return jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)


# Of roles, keys and types, which templates compare with what is no word of a message.
_NAMES = {
    *("system", "user", "assistant", "tool", "developer", "ipython", "model", "function", "role", "content", "text"),
    *("tool_calls", "reasoning_content", "name", "type", "arguments", "image", "video", "audio", "string", "object"),
}


def reads(text: str) -> set[str]:
    """The variables that a template takes from outside."""
    return meta.find_undeclared_variables(_parsed(text))


def tested_words(text: str) -> set[str]:
    """The texts that a template looks for in what it is given, which decide what it writes."""
    found: set[str] = set()
    for node in _parsed(text).find_all((nodes.Compare, nodes.Call, nodes.Filter)):
        found |= set(_constants(node))
    return {words for words in found - _NAMES if words.strip()}


def _constants(node: nodes.Node) -> Iterator[str]:
    for constant in node.find_all(nodes.Const):
        if isinstance(constant.value, str):
            yield constant.value


# ---------------------------------------------------------------------------------------------------------- its date


def writes_date(text: str) -> bool:
    """Whether what the template writes depends on the day."""
    return "strftime_now" in reads(text)


def with_date(text: str, day: str) -> str:
    """The template with the date that it writes fixed to `day`, as YYYY-MM-DD."""
    if not day or not writes_date(text):
        return text
    formats = {words for words in _constants(_parsed(text)) if "%" in words}
    known = {words: date.fromisoformat(day).strftime(words) for words in sorted(formats)}
    return (
        f"{{%- set sft_lab_dates = {json.dumps(known, ensure_ascii=False)} -%}}"
        "{%- macro strftime_now(format) -%}{{ sft_lab_dates[format] if format in sft_lab_dates else "
        "raise_exception('the format of a date is not written out in the template') }}{%- endmacro %}{{ '' }}" + text
    )
