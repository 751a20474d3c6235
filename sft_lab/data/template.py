"""Chat templates: which one a run uses, and what its tokenizer needs for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from sft_lab.errors import PreflightError

TEMPLATES_DIR = Path(__file__).parent.parent / "templates"
_NEEDS = {"chatml": ("<|im_start|>", "<|im_end|>"), "zephyr": ()}
# Tokens that vocabularies keep for padding or for nothing, in the order in which we would rather take them.
_PAD_CANDIDATES = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|endoftext|>",
    "<unk>",
    "<|reserved_special_token_0|>",
)


@dataclass(frozen=True)
class TurnEnd:
    """The token that ends an assistant turn: what the model learns to stop with."""

    token: str
    id: int


def apply(tokenizer: Any, name: str) -> tuple[str, TurnEnd]:
    """Give `tokenizer` the chat template `name`, and a pad token that ends nothing.

    Returns:
        The template's name with `auto` resolved, and the token that ends an assistant turn.

    Raises:
        PreflightError: the tokenizer lacks a token that the template writes, or the template ends no turn.
    """
    if not tokenizer.is_fast:
        raise PreflightError(
            f"model.path: {type(tokenizer).__name__} gives no character offsets, a fast tokenizer is needed"
        )
    used = name
    if name == "auto":
        used = "auto (the model's own)" if tokenizer.chat_template else "zephyr (the model has none of its own)"
    if name != "auto" or not tokenizer.chat_template:
        _set(tokenizer, "zephyr" if name == "auto" else name)
    turn_end = _turn_end(tokenizer, used)
    _set_pad(tokenizer, turn_end)
    return used, turn_end


def _set(tokenizer: Any, name: str) -> None:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in _NEEDS[name] if token not in vocabulary]
    if missing:
        raise PreflightError(
            f"chat_template={name} : the tokenizer has no {' and no '.join(missing)} (allowed: chat_template=zephyr, "
            "which needs no new tokens, or a model that has them)"
        )
    if tokenizer.eos_token is None:
        raise PreflightError(f"chat_template={name} : the tokenizer has no end-of-sequence token to end a turn with")
    tokenizer.chat_template = (TEMPLATES_DIR / f"{name}.jinja").read_text(encoding="utf-8")


def _turn_end(tokenizer: Any, used: str) -> TurnEnd:
    """The first special token that the template writes after an assistant's words."""
    words = "sft-lab-probe"
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    try:
        text = tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError as error:
        raise PreflightError(f"chat_template={used} : it fails on a question and an answer ({error})") from None
    if words not in text:
        raise PreflightError(f"chat_template={used} : it leaves out what the assistant says")
    after = text[text.rindex(words) + len(words) :]
    specials = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
    for id_ in tokenizer(after, add_special_tokens=False)["input_ids"]:
        if id_ in specials or id_ == tokenizer.eos_token_id:
            return TurnEnd(specials.get(id_, tokenizer.eos_token), id_)
    raise PreflightError(
        f"chat_template={used} : no special token ends an assistant turn, the model could not learn to stop "
        f"(after the assistant's words it writes {after!r})"
    )


def _set_pad(tokenizer: Any, turn_end: TurnEnd) -> None:
    """A pad token that is also an end token is how a tuned model comes to never stop (huggingface/trl#734)."""
    ends = {turn_end.id, tokenizer.eos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return
    vocabulary = tokenizer.get_vocab()
    for token in _PAD_CANDIDATES:
        if token in vocabulary and vocabulary[token] not in ends:
            tokenizer.pad_token = token
            return
    # No spare token. Any that ends nothing will do: padding stands right of the text, unseen by causal attention.
    tokenizer.pad_token = next(
        token for token, id_ in sorted(vocabulary.items(), key=lambda x: x[1]) if id_ not in ends
    )
