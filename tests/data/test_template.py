"""Chat templates on real small tokenizers: what ends a turn, and a pad token that ends nothing."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sft_lab.data.template import apply
from sft_lab.errors import PreflightError

CHATML = ["<|im_start|>", "<|im_end|>"]
HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def tokenizer_with(
    *tokens: str,
    eos: str | None = "</s>",
    pad: str | None = None,
    template: str | None = None,
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few merges with `<s>`, `</s>` and `tokens` as special tokens.

    trim_offsets: character offsets leave out a token's white space, as GPT-NeoX's do.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if trim_offsets:
        bpe.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", *tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(
        ["assistant user system\n\n    return hello\n\n good day, what is the answer?"] * 3, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token=eos, pad_token=pad, chat_template=template
    )


@pytest.mark.parametrize(
    ("name", "tokenizer", "end"),
    [
        ("chatml", {"tokens": CHATML}, "<|im_end|>"),
        ("chatml", {"tokens": CHATML, "eos": "<|im_end|>"}, "<|im_end|>"),
        ("zephyr", {"tokens": []}, "</s>"),
        ("zephyr", {"tokens": CHATML, "template": LLAMA2}, "</s>"),
        ("auto", {"tokens": [], "template": LLAMA2}, "</s>"),
        ("auto", {"tokens": ["<|eot|>"], "template": NO_END.replace("'\n'", "'<|eot|>\n'")}, "<|eot|>"),
        ("auto", {"tokens": []}, "</s>"),
    ],
)
def test_the_token_that_ends_a_turn_is_found(name: str, tokenizer: dict[str, Any], end: str) -> None:
    made = tokenizer_with(*tokenizer.pop("tokens"), **tokenizer)
    _, found = apply(made, name)
    assert (found.token, found.id) == (end, made.convert_tokens_to_ids(end))


def test_auto_keeps_the_models_own_template_and_else_takes_zephyr() -> None:
    own, none = tokenizer_with(template=LLAMA2), tokenizer_with()
    assert apply(own, "auto")[0] == "auto (the model's own)"
    assert own.chat_template == LLAMA2
    assert apply(none, "auto")[0].startswith("zephyr")
    assert none.apply_chat_template(HELLO, tokenize=False) == "<s><|user|>\nhello</s>\n<|assistant|>\ngood day</s>\n"


def test_chatml_renders_as_it_is_known() -> None:
    tokenizer = tokenizer_with(*CHATML)
    apply(tokenizer, "chatml")
    assert tokenizer.apply_chat_template(HELLO[:1], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("pad", [None, "</s>", "<|im_end|>", "<|im_start|>", "<|pad|>"])
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
@pytest.mark.parametrize("name", ["chatml", "zephyr"])
def test_pad_ends_nothing(name: str, eos: str, pad: str | None) -> None:
    """Where it does, every batch teaches that nothing need end (huggingface/trl#734)."""
    tokenizer = tokenizer_with(*CHATML, "<|pad|>", eos=eos, pad=pad)
    before = len(tokenizer)
    _, end = apply(tokenizer, name)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id not in (end.id, tokenizer.eos_token_id)
    if pad in ("<|pad|>", None):
        assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == before  # a new token would have no embedding


def test_pad_ends_nothing_even_where_no_token_is_spare() -> None:
    tokenizer = tokenizer_with(pad="</s>")
    before = len(tokenizer)
    _, end = apply(tokenizer, "zephyr")
    assert tokenizer.pad_token_id != end.id
    assert len(tokenizer) == before


def test_a_spare_pad_token_of_the_model_is_kept() -> None:
    tokenizer = tokenizer_with("<spare>", "<|pad|>", pad="<spare>")
    apply(tokenizer, "zephyr")
    assert tokenizer.pad_token == "<spare>"


@pytest.mark.parametrize("tokens", [[], CHATML[:1], CHATML[1:]])
def test_chatml_is_refused_without_its_tokens(tokens: list[str]) -> None:
    """Spelt out in pieces they would be learned anew, from a few rows."""
    with pytest.raises(PreflightError, match=r"chat_template=chatml : .* \(allowed: chat_template=zephyr") as refused:
        apply(tokenizer_with(*tokens), "chatml")
    assert all((f"no {token}" in str(refused.value)) == (token not in tokens) for token in CHATML)


def test_zephyr_is_refused_without_an_end_of_sequence_token() -> None:
    with pytest.raises(PreflightError, match="chat_template=zephyr : the tokenizer has no end-of-sequence token"):
        apply(tokenizer_with(eos=None), "zephyr")


def test_a_template_that_ends_no_turn_is_refused() -> None:
    with pytest.raises(PreflightError, match=r"no special token ends an assistant turn, .* it writes '\\n'"):
        apply(tokenizer_with(template=NO_END), "auto")


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{{ messages[0]['contents'].x }}"])
def test_a_template_that_cannot_be_rendered_is_refused(template: str) -> None:
    with pytest.raises(PreflightError, match="chat_template=auto"):
        apply(tokenizer_with(template=template), "auto")
