"""Chat templates: which one a run uses, and what its tokenizer needs for it.

A template comes in two texts. `Template.asking` is for asking: it stays in the tokenizer and is saved with it.
`Template.text` renders the rows of training: the same words with marks around what the assistant says where such a
version exists. A model may have two more for conversations with tools.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from importlib.resources import files as files_of
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from sft_lab.data import rendering
from sft_lab.data.messages import Message
from sft_lab.data.rendering import ANSWER, ASK, PROBE, TOOL, call, render, result
from sft_lab.data.values import nearest
from sft_lab.errors import PreflightError

TEMPLATES_DIR = Path(__file__).parent.parent / "templates"
_TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")  # by rendering itself

# What each template writes as one token. The others' markers are plain text, and end-of-sequence ends their turns.
_CHATML = ("<|im_start|>", "<|im_end|>")
_TOKENS = {
    "chatml": _CHATML,
    "qwen": _CHATML,
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
# Which of TRL's files stands for a family. Llama 3.1 and 3.2 write the day's date into every row. Gemma 1 and 2 refuse
# a system prompt, Gemma 3 puts it before the first question and is the same otherwise. Qwen3-Instruct-2507 writes tools
# like its siblings, but no system prompt of its own as Qwen2.5 does, and no empty thought as Qwen3 does.
_TRL_FILES = {"llama3": "llama3", "gemma": "gemma3", "qwen": "qwen3_instruct_2507"}
# What ends a turn in one family or another. A checkpoint's generation config may well stop at one of them.
_ENDS = (
    *("</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>"),
    *("<|end|>", "<|return|>", "<|call|>", "<|eot|>"),
)
# Tokens that vocabularies keep for padding or for nothing, in the order in which we would rather take them.
_PAD_CANDIDATES = (
    *("<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>"),
    "<|reserved_special_token_0|>",
)


@dataclass(frozen=True)
class TurnEnd:
    """The token that ends an assistant turn: what the model learns to stop with.

    before: special tokens that the template writes right before it, without which it does not come.
    """

    token: str
    id: int
    before: str = ""

    @property
    def text(self) -> str:
        return self.before + self.token


@dataclass(frozen=True)
class Template:
    """What renders the rows of a run.

    name: as shown to the user, `auto` resolved.
    text: the jinja that renders them, to be tokenised without adding special tokens.
    turn_end: what ends an answer.  call_end: what ends a turn that calls tools, where that is another token.
    added_tokens: those that the tokenizer did not have. They have no embedding yet, and it must be trained.
    asking: the jinja that the model is asked with; as `text` if empty.
    tool_text, tool_asking: the same two for conversations with tools, where the model has others for them.
    variables: what `chat_template.kwargs` gives the template, as JSON.
    date: the day that the texts write, as YYYY-MM-DD, fixed when the run began; empty where they write none.
    """

    name: str
    text: str
    turn_end: TurnEnd
    added_tokens: tuple[str, ...] = ()
    asking: str = ""
    tool_text: str = ""
    tool_asking: str = ""
    call_end: TurnEnd | None = None
    variables: str = "{}"
    date: str = ""

    @property
    def ends(self) -> list[int]:
        """The tokens at which an answer is over."""
        return [end.id for end in (self.turn_end, self.call_end) if end is not None]

    def for_tools(self) -> Template:
        """What renders a conversation with tools."""
        if not self.tool_text:
            return self
        return dataclasses.replace(self, text=self.tool_text, asking=self.tool_asking, tool_text="", tool_asking="")

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Template:
        """From what `dataclasses.asdict` made of one and JSON kept."""
        call_end = kept.get("call_end")
        return cls(
            **{
                **kept,
                "turn_end": TurnEnd(**kept["turn_end"]),
                "call_end": TurnEnd(**call_end) if call_end else None,
                "added_tokens": tuple(kept["added_tokens"]),
            }
        )


def apply(
    tokenizer: Any, name: str, path: str = "", variables: Mapping[str, Any] | None = None, day: str = ""
) -> Template:
    """Give `tokenizer` the chat template `name` and a pad token that ends nothing, and say what renders the rows.

    name: auto (the model's own, else zephyr), chatml, zephyr, llama3, mistral, gemma, qwen, alpaca or file.
    path: the jinja file of `file`.  variables: what else the template is given, such as enable_thinking.
    day: the date that it writes, as YYYY-MM-DD; today's if empty.

    Raises:
        PreflightError: the template cannot be read or rendered, or ends no turn, or reads none of a variable that it is
            given, or the tokenizer has no end token.
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise PreflightError(f"model.path: {kind} gives no character offsets, a fast tokenizer is needed")
    added: tuple[str, ...] = ()
    tool_asking = ""
    if name == "auto" and tokenizer.chat_template:
        shown, text = _own(tokenizer)
        tool_asking = _tool_use(tokenizer)
    elif name == "file":
        shown, text = f"file ({Path(path).name})", _read(path)
        tokenizer.chat_template = text
    else:
        shown = "zephyr (the model has none of its own)" if name == "auto" else name
        text, added = _give(tokenizer, "zephyr" if name == "auto" else name)
    variables = dict(variables or {})
    texts = {"text": text, "asking": tokenizer.get_chat_template()}
    if tool_asking:
        texts |= {"tool_text": _in_training_version(tool_asking) or tool_asking, "tool_asking": tool_asking}
    _check_variables(shown, variables, texts)
    fixed = _date_of(texts, day)
    given = {**tokenizer.special_tokens_map, **variables}
    probes = _Probes(shown, rendering.with_date(texts["text"], fixed), given)
    turn_end, ends = _turn_end(tokenizer, shown, probes)
    with_tools = rendering.with_date(texts.get("tool_text", texts["text"]), fixed)
    call_end = _call_end(tokenizer, _Probes(shown, with_tools, given))
    _set_pad(tokenizer, ends | ({call_end.id} if call_end else set()), probes.answer)
    return Template(
        shown,
        turn_end=turn_end,
        added_tokens=added,
        call_end=None if call_end == turn_end else call_end,
        variables=json.dumps(variables, sort_keys=True),
        date=fixed,
        **texts,
    )


def puts_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with its beginning-of-sequence token."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


def marker_pattern(tokenizer: Any) -> re.Pattern[str]:
    """What finds special tokens in a text, and others that were added to the vocabulary as a whole."""
    tokens = {token.content for token in tokenizer.added_tokens_decoder.values()} | {tokenizer.eos_token}
    return re.compile("|".join(map(re.escape, sorted(tokens - {None, ""}, key=len, reverse=True))) or r"(?!)")


def known_ends(tokenizer: Any) -> set[str]:
    """Tokens of the vocabulary that end a turn in one family of models or another, and the tokenizer's own."""
    vocabulary = tokenizer.get_vocab()
    return {token for token in (*_ENDS, tokenizer.eos_token) if token in vocabulary}


def _check_variables(shown: str, variables: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    try:
        known = set().union(*(rendering.reads(text) for text in texts.values()))
    except TemplateSyntaxError as error:
        raise _no_jinja(shown, error) from None
    for name in variables:
        if name in _TAKEN or name.endswith("_token"):
            raise PreflightError(f"chat_template.kwargs.{name} : is given to every template by sft_lab itself")
        if name not in known:
            allowed = sorted(known - {*_TAKEN, "raise_exception", "strftime_now", "namespace", "dict"})
            own = [one for one in allowed if not one.endswith("_token")]
            hint = f"allowed: {', '.join(own) or 'none, it reads no variable'}{nearest(name, own)}"
            raise PreflightError(f"chat_template.kwargs.{name} : the chat template {shown} does not read it ({hint})")


def _date_of(texts: Mapping[str, str], day: str) -> str:
    """The date that the templates write; empty where none writes one."""
    if not any(map(rendering.writes_date, texts.values())):
        return ""
    try:
        return (date.fromisoformat(day) if day else date.today()).isoformat()
    except ValueError:
        raise PreflightError(f"chat_template.date={day} : is no date (allowed: YYYY-MM-DD)") from None


# ---------------------------------------------------------------------------------------------- where a text is from


def _own(tokenizer: Any) -> tuple[str, str]:
    try:
        own = tokenizer.get_chat_template()
    except ValueError:  # several by name
        names = ", ".join(sorted(tokenizer.chat_template))
        raise PreflightError(f"chat_template=auto : the model has several templates and no default ({names})") from None
    if marked := _in_training_version(own):
        return "auto (the model's own, in TRL's version for training)", marked
    return "auto (the model's own)", own


def _tool_use(tokenizer: Any) -> str:
    """The template that the model has for conversations with tools; empty where it has none beside its own."""
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    return str(named.get("tool_use", ""))


def _in_training_version(own: str) -> str:
    """TRL's version of a model's template with marks; empty where TRL has none of it."""
    for plain in _trl_files():
        if plain.read_text(encoding="utf-8") == own:
            return _marked(plain).read_text(encoding="utf-8")
    return ""


@lru_cache(maxsize=1)
def _trl_files() -> list[Path]:
    """TRL's copies of templates as models ship them, as far as it also has a version with marks for training."""
    files = sorted(Path(str(files_of("trl"))).glob("chat_templates/*.jinja"))
    return [file for file in files if _marked(file) in files]


def _marked(plain: Path) -> Path:
    return plain.with_name(f"{plain.stem}_training.jinja")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise PreflightError(f"chat_template.path={path} : cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise PreflightError(f"chat_template.path={path} : is no UTF-8 text ({error})") from None


def _give(tokenizer: Any, name: str) -> tuple[str, tuple[str, ...]]:
    """Put the template of that name into the tokenizer; the text that renders rows, and the tokens that are new."""
    if name not in _TOKENS and tokenizer.eos_token is None:
        raise PreflightError(f"chat_template={name} : the tokenizer has no end-of-sequence token to end a turn with")
    asking = rows = TEMPLATES_DIR / f"{name}.jinja"
    if name in _TRL_FILES:
        asking = next(file for file in _trl_files() if file.stem == _TRL_FILES[name])
        rows = _marked(asking)
    added = _add_tokens(tokenizer, _TOKENS.get(name, ()))
    tokenizer.chat_template = _with_bos(tokenizer, asking.read_text(encoding="utf-8"))
    return _with_bos(tokenizer, rows.read_text(encoding="utf-8")), added


def _add_tokens(tokenizer: Any, tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Make each of them one special token; those that the vocabulary lacked are returned."""
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    # Some vocabularies have the word and do not read it as one token.
    split = [t for t in tokens if vocabulary.get(t) not in tokenizer(t, add_special_tokens=False)["input_ids"]]
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in split], special_tokens=True)
    return tuple(t for t in tokens if t not in vocabulary)


def _with_bos(tokenizer: Any, text: str) -> str:
    """The template with a beginning-of-sequence token where the tokenizer puts one before a text, and never two."""
    if tokenizer.bos_token is None:  # a template that joins it to a text would fail without
        return "{%- set bos_token = '' %}" + text if "bos_token" in text else text
    rendered, _ = render(text, tokenizer.special_tokens_map, [{"role": "user", "content": PROBE}])
    if puts_bos(tokenizer) and not rendered.startswith(tokenizer.bos_token):
        return "{{- bos_token }}" + text
    return text


# ----------------------------------------------------------------------------------------------- what ends and pads


def _no_jinja(shown: str, error: TemplateSyntaxError) -> PreflightError:
    return PreflightError(f"chat_template={shown} : line {error.lineno} is no jinja ({error.message})")


class _Probes:
    """What a template writes of short conversations, each up to where the probe's words end."""

    def __init__(self, shown: str, text: str, variables: Mapping[str, Any]):
        self._text, self._variables = text, variables
        try:
            self.form = rendering.form_of(text, variables)
            self.answer = render(text, variables, self.form.encoded([ASK, ANSWER]))[0]
        except TemplateSyntaxError as error:
            raise _no_jinja(shown, error) from None
        except TemplateError as error:
            told = f"it fails on a question and an answer ({error})"
            raise PreflightError(f"chat_template={shown} : {told}") from None
        if PROBE not in self.answer:
            raise PreflightError(f"chat_template={shown} : it leaves out what the assistant says")

    def after(self, *messages: Message, tools: list[dict[str, Any]] | None = None, until: str = "") -> str:
        """What stands behind the probe's words, up to the words `until`; empty where the template refuses it."""
        try:
            written, _ = render(self._text, self._variables, self.form.encoded(list(messages)), tools)
        except TemplateError:
            return ""
        head, found, _ = written.partition(until) if until else (written, "", "")
        if until and not found:
            return ""
        return head.rpartition(PROBE)[2] if PROBE in head else ""


_NEXT = "sft-lab-next"


def _turn_end(tokenizer: Any, shown: str, probes: _Probes) -> tuple[TurnEnd, set[int]]:
    """What ends an answer, and all tokens that may end something."""
    after = probes.answer.rpartition(PROBE)[2]
    between = probes.after(ASK, ANSWER, {"role": "user", "content": _NEXT}, until=_NEXT)
    end = _end(tokenizer, after, between, calls=False)
    if end is None:
        raise PreflightError(
            f"chat_template={shown} : no special token ends an assistant turn, the model could not learn to stop "
            f"(after the assistant's words it writes {after!r}; allowed: a template that writes eos_token there)"
        )
    markers = marker_pattern(tokenizer).findall(after)
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary[token] for token in {*markers, *known_ends(tokenizer)} if token in vocabulary}
    return end, ends | ({tokenizer.eos_token_id} - {None})


def _call_end(tokenizer: Any, probes: _Probes) -> TurnEnd | None:
    """What ends a turn that calls tools; None where the template writes no calls."""
    after = probes.after(ASK, call(PROBE, x=PROBE), tools=[TOOL])
    between = probes.after(ASK, call(PROBE, x=PROBE), result(_NEXT), tools=[TOOL], until=_NEXT)
    return _end(tokenizer, after, between, calls=True)


Marker = tuple[str, int, int]  # a token in a text, where it begins, and where it stops


def _end(tokenizer: Any, last: str, between: str, calls: bool) -> TurnEnd | None:
    """The token that ends a turn, of what stands behind its words where nothing follows and where a message does.

    Both have it, and what closes the answer before it; only the first may have what ends a text, only the second the
    header of the next message. Tokens that stand together end it together, up to the tokenizer's own end.
    """
    pattern = marker_pattern(tokenizer)
    ending, inside = ([(m[0], m.start(), m.end()) for m in pattern.finditer(text)] for text in (last, between))
    same = 0
    while same < min(len(ending), len(inside)) and last[: ending[same][2]] == between[: inside[same][2]]:
        same += 1
    runs = _runs(ending[:same] or ending)  # none: turns end in different tokens, or the template takes a single one
    if not runs:
        return None
    if calls:  # before it are tokens that belong to the calls
        run = runs[-1]
    else:
        known = known_ends(tokenizer)
        run = next((run for run in runs if known & set(run)), runs[0])
    if tokenizer.eos_token in run:
        run = run[: run.index(tokenizer.eos_token) + 1]
    return TurnEnd(run[-1], tokenizer.convert_tokens_to_ids(run[-1]), "".join(run[:-1]))


def _runs(markers: list[Marker]) -> list[list[str]]:
    """Tokens that stand together."""
    runs: list[list[str]] = []
    stopped = -1
    for token, start, stop in markers:
        if start == stopped:
            runs[-1].append(token)
        else:
            runs.append([token])
        stopped = stop
    return runs


def _set_pad(tokenizer: Any, ends: set[int], answer: str) -> None:
    """A pad token that is also an end token is how a tuned model comes to never stop (huggingface/trl#734)."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return
    vocabulary = tokenizer.get_vocab()
    spare = [token for token in _PAD_CANDIDATES if vocabulary.get(token, -1) not in {-1, *ends}]
    # Else any will do: padding stands right of the text, unseen by causal attention. But a pad token is special from
    # then on: it is left out where answers are decoded. So rather one that is special already, and not in use, ...
    specials = [t.content for i, t in sorted(tokenizer.added_tokens_decoder.items()) if t.special and i not in ends]
    spare += sorted(specials, key=lambda token: token == tokenizer.bos_token or token in answer)
    if not spare:  # ... or the last of the vocabulary, its rarest
        known = {*tokenizer.added_tokens_decoder, *ends}
        spare = [max((token for token, id_ in vocabulary.items() if id_ not in known), key=vocabulary.__getitem__)]
    tokenizer.pad_token = spare[0]
