"""Chat templates: which one a run uses, and what its tokenizer needs for it.

A template comes in two texts. One is for asking: it stays in the tokenizer and is saved with it. The other renders the
rows of training: `Template.text`, the same words with marks around what the assistant says where such a version exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files as files_of
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from sft_lab.errors import PreflightError

TEMPLATES_DIR = Path(__file__).parent.parent / "templates"
PROBE = "sft-lab-probe"  # words that no template writes by itself

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
    """The token that ends an assistant turn: what the model learns to stop with."""

    token: str
    id: int


@dataclass(frozen=True)
class Template:
    """What renders the rows of a run.

    name: as shown to the user, `auto` resolved.
    text: the jinja that renders them, to be tokenised without adding special tokens.
    added_tokens: those that the tokenizer did not have. They have no embedding yet, and it must be trained.
    """

    name: str
    text: str
    turn_end: TurnEnd
    added_tokens: tuple[str, ...] = ()


def apply(tokenizer: Any, name: str, path: str = "") -> Template:
    """Give `tokenizer` the chat template `name` and a pad token that ends nothing, and say what renders the rows.

    name: auto (the model's own, else zephyr), chatml, zephyr, llama3, mistral, gemma, qwen, alpaca or file.
    path: the jinja file of `file`.

    Raises:
        PreflightError: the template cannot be read or rendered, or ends no turn, or the tokenizer has no end token.
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise PreflightError(f"model.path: {kind} gives no character offsets, a fast tokenizer is needed")
    added: tuple[str, ...] = ()
    if name == "auto" and tokenizer.chat_template:
        shown, text = _own(tokenizer)
    elif name == "file":
        shown, text = f"file ({Path(path).name})", _read(path)
        tokenizer.chat_template = text
    else:
        shown = "zephyr (the model has none of its own)" if name == "auto" else name
        text, added = _give(tokenizer, "zephyr" if name == "auto" else name)
    answer = _answer(tokenizer, shown, text)
    turn_end, ends = _turn_end(tokenizer, shown, answer)
    _set_pad(tokenizer, ends, answer)
    return Template(shown, text, turn_end, added)


def render(
    text: str,
    variables: dict[str, str],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    prompt: bool = False,
    marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation in the template `text`, and with `marks` the ranges of characters that it marks as generated.

    As `apply_chat_template` does it, without choosing a template and tokenising on the way.
    variables: the tokenizer's `special_tokens_map`.  prompt: end with what makes the assistant speak.

    Raises:
        TemplateError, TypeError: the template refuses the conversation.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, ranges = render_jinja_template(
        [messages],
        tools=tools or None,  # to some templates an empty list is a list of tools
        chat_template=text,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=marks,
        **variables,
    )
    return rendered[0], ranges[0] if marks else []


def is_marked(text: str) -> bool:
    """Whether the template says what the assistant generates."""
    return re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text) is not None


def puts_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with its beginning-of-sequence token."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]


# ---------------------------------------------------------------------------------------------- where a text is from


def _own(tokenizer: Any) -> tuple[str, str]:
    try:
        own = tokenizer.get_chat_template()
    except ValueError:  # several by name
        names = ", ".join(sorted(tokenizer.chat_template))
        raise PreflightError(f"chat_template=auto : the model has several templates and no default ({names})") from None
    for plain in _trl_files():
        if plain.read_text(encoding="utf-8") == own:
            return "auto (the model's own, in TRL's version for training)", _marked(plain).read_text(encoding="utf-8")
    return "auto (the model's own)", own


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


def _answer(tokenizer: Any, shown: str, text: str) -> str:
    """A question and an answer, the probe's words, as the template writes them."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    try:
        rendered, _ = render(text, tokenizer.special_tokens_map, messages)
    except TemplateSyntaxError as error:
        raise PreflightError(f"chat_template={shown} : line {error.lineno} is no jinja ({error.message})") from None
    except (TemplateError, TypeError) as error:
        raise PreflightError(f"chat_template={shown} : it fails on a question and an answer ({error})") from None
    if PROBE not in rendered:
        raise PreflightError(f"chat_template={shown} : it leaves out what the assistant says")
    return rendered


def _turn_end(tokenizer: Any, shown: str, answer: str) -> tuple[TurnEnd, set[int]]:
    """The first special token that the template writes after an assistant's words, and all that may end something."""
    after = answer.rpartition(PROBE)[2]
    specials = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
    if tokenizer.eos_token_id is not None:
        specials.setdefault(tokenizer.eos_token_id, tokenizer.eos_token)
    found = [id_ for id_ in tokenizer(after, add_special_tokens=False)["input_ids"] if id_ in specials]
    if not found:
        raise PreflightError(
            f"chat_template={shown} : no special token ends an assistant turn, the model could not learn to stop "
            f"(after the assistant's words it writes {after!r})"
        )
    vocabulary = tokenizer.get_vocab()
    ends = {*found, tokenizer.eos_token_id, *(vocabulary[token] for token in _ENDS if token in vocabulary)}
    return TurnEnd(specials[found[0]], found[0]), ends


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
