"""Which tokens carry loss, compared with references that know nothing of how sft_lab finds them."""

from __future__ import annotations

import itertools
import string
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from sft_lab.data.formats import Message, RowError
from sft_lab.data.template import TurnEnd, apply
from sft_lab.data.tokenize import IGNORE, prompt_and_reference, tokenize
from tests.data.test_template import CHATML, tokenizer_with

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn, the user first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


CONVERSATIONS = {
    "one turn": chat("2 + 2?", "4"),
    "many turns and a system prompt": chat("a", "first", "b", "second", "c", "third", system="Be brief."),
    "unicode": chat("größer 🙂?", "naïve 👩‍👩‍👧 日本語\u2028 ok", "é", "e\u0301"),
    "empty assistant turns": chat("a", "", "b", ""),
    "empty everything": chat("", "", system=""),
    "user last": chat("a", "first", "b"),
    "twice the same": chat("yes", "yes", "yes", "yes"),
    "two assistant turns in a row": [*chat("a", "one"), {"role": "assistant", "content": "two"}],
    "assistant first": [{"role": "assistant", "content": "Welcome!"}, *chat("a", "first")],
    "system, then assistant": [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Welcome!"},
        *chat("a", "first"),
    ],
    "white space": chat("a", "  indented\n    more\n\n"),
    "tool": [*chat("a", "call"), {"role": "tool", "content": "42"}, {"role": "assistant", "content": "It is 42."}],
    "a user writes an end token": chat("what does <|im_end|> or </s> do?", "it ends a turn"),
    "a user writes a whole turn": chat("say:\n<|im_start|>assistant\nno<|im_end|>\n<|assistant|>\nno</s>", "yes"),
    "a user writes the word assistant": chat("assistant\nassistant\n", "assistant\n"),
    "an assistant writes an end token": chat("a", "it is <|im_end|> or </s>, I say", "b", "c"),
    "an assistant ends with an end token": chat("a", "it is <|im_end|></s>", "b", "it is </s><|im_end|>"),
    "an assistant writes a whole turn": chat("a", "<|im_start|>user\nb<|im_end|>\n<|user|>\nb</s>\n", "c", "d"),
}


def pieces(name: str, messages: list[Message]) -> list[tuple[str, str, str]]:
    """Each message as (what stands before its words, the words with their end token, what stands after)."""
    if name == "chatml":
        return [(f"<|im_start|>{m['role']}\n", f"{m['content']}<|im_end|>", "\n") for m in messages]
    first = ["<s>"] + [""] * len(messages)
    return [(f"{bos}<|{m['role']}|>\n", f"{m['content']}</s>", "\n") for bos, m in zip(first, messages, strict=False)]


def reference(name: str, tokenizer: Any, messages: list[Message]) -> tuple[str, list[int]]:
    """The text that the template must give, and labels by where each token's characters lie in it."""
    text, trained = "", set()
    for (before, words, after), message in zip(pieces(name, messages), messages, strict=True):
        start = len(text) + len(before)
        text += before + words + after
        if message["role"] == "assistant":
            assert text.find(words, start) == start
            trained |= set(range(start, start + len(words)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return text, [
        id_ if set(range(*offset)) and set(range(*offset)) <= trained else IGNORE
        for id_, offset in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def made(name: str, **options: Any) -> tuple[PreTrainedTokenizerFast, TurnEnd]:
    tokenizer = tokenizer_with(*CHATML, **options)
    return tokenizer, apply(tokenizer, name)[1]


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", ["chatml", "zephyr"])
def test_labels_are_those_of_a_search_in_the_text(name: str, messages: list[Message]) -> None:
    tokenizer, end = made(name)
    row = tokenize(tokenizer, messages, end)
    text, labels = reference(name, tokenizer, messages)
    assert tokenizer.decode(row["input_ids"]) == text
    assert row["labels"] == labels


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", ["chatml", "zephyr"])
def test_what_carries_loss_reads_as_the_assistants_words_and_their_ends(name: str, messages: list[Message]) -> None:
    """Read back from the token ids, so that it holds whatever the tokenizer says of offsets."""
    tokenizer, end = made(name)
    labels = tokenize(tokenizer, messages, end)["labels"]
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == said(messages, end)
    assert labels[0] == IGNORE


def said(messages: list[Message], end: TurnEnd) -> str:
    return "".join(message["content"] + end.token for message in messages if message["role"] == "assistant")


@pytest.mark.parametrize(
    "messages", [chat("a", "if x:\n    return 1"), CONVERSATIONS["many turns and a system prompt"]]
)
def test_white_space_is_trained_where_offsets_leave_it_out(messages: list[Message]) -> None:
    """GPT-NeoX's tokenizer, and Pythia's, gives a token of spaces alone the empty range of characters."""
    tokenizer, end = made("chatml", trim_offsets=True)
    labels = tokenize(tokenizer, messages, end)["labels"]
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == said(messages, end)


@pytest.mark.parametrize(
    "name", ["one turn", "many turns and a system prompt", "empty assistant turns", "twice the same"]
)
def test_labels_of_a_tokenizer_that_puts_a_space_before_its_text(name: str) -> None:
    """Llama 2's and Mistral's do so after each special token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*string.printable, "▁"],
        show_progress=False,
    )
    bpe.train_from_iterator(["<|assistant|>\n<|user|>\n", "hello good day"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    _, end = apply(tokenizer, "zephyr")
    labels = tokenize(tokenizer, CONVERSATIONS[name], end)["labels"]
    tokens = tokenizer.convert_ids_to_tokens([label for label in labels if label != IGNORE])
    assert "".join(tokens).replace("▁", " ") == said(CONVERSATIONS[name], end)


def test_line_breaks_shared_with_the_header_are_not_trained() -> None:
    """`assistant\\n` and an answer that begins with a line break become one token, which the model never writes."""
    tokenizer, end = made("chatml")
    row = tokenize(tokenizer, chat("a", "\n\nhello"), end)
    text, labels = reference("chatml", tokenizer, chat("a", "\n\nhello"))
    assert (tokenizer.decode(row["input_ids"]), row["labels"]) == (text, labels)


# ------------------------------------------------------------------------------------------ templates in the wild

SPECIAL = {
    "gemma": ["<start_of_turn>", "<end_of_turn>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    "qwen2_5": CHATML,
    "qwen3": CHATML,
}
WILD = {
    "one turn": chat("2 + 2?", "4"),
    "two turns": chat("a", "first", "b", "second"),
    "an answer that begins with a space": chat("a", " first"),
    "an answer that begins with many spaces": chat("a", "      x"),
    "an answer that ends with spaces": chat("a", "first  \n", "b", "second\n"),
}


@pytest.mark.parametrize("messages", WILD.values(), ids=WILD)
@pytest.mark.parametrize("family", [family for family in SPECIAL if family != "qwen3"])
def test_labels_are_those_that_trl_marks_in_the_families_own_templates(family: str, messages: list[Message]) -> None:
    """TRL ships each family's template, and one that marks what the assistant says by {% generation %}."""
    own, marked = (TRL_TEMPLATES / f"{family}{kind}.jinja" for kind in ("", "_training"))
    tokenizer = tokenizer_with(*SPECIAL[family], template=own.read_text(encoding="utf-8"))
    _, end = apply(tokenizer, "auto")
    row = tokenize(tokenizer, messages, end)
    expected = tokenizer.apply_chat_template(
        messages, chat_template=marked.read_text(encoding="utf-8"), return_dict=True, return_assistant_tokens_mask=True
    )
    assert row["input_ids"] == list(expected["input_ids"])
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    spans = []
    for marked, pairs in itertools.groupby(
        zip(expected["input_ids"], expected["assistant_masks"], strict=True), key=lambda pair: pair[1]
    ):
        if marked:  # some of the templates mark the header's line break too, and what follows the end token
            span = [id_ for id_, _ in pairs]
            spans += span[span[:1] == line_break : span.index(end.id) + 1]
    assert [label for label in row["labels"] if label != IGNORE] == spans


def test_qwen3_trains_every_turn_of_its_own_template() -> None:
    """It writes an empty thought before the last answer alone, so TRL's training template is another text."""
    own = (TRL_TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(*CHATML, template=own)
    _, end = apply(tokenizer, "auto")
    row = tokenize(tokenizer, chat("a", "first", "b", "second"), end)
    trained = tokenizer.decode([label for label in row["labels"] if label != IGNORE])
    assert trained == "first<|im_end|><think>\n\n</think>\n\nsecond<|im_end|>"


def test_a_conversation_that_the_template_refuses_is_a_bad_row() -> None:
    template = (TRL_TEMPLATES / "gemma.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(*SPECIAL["gemma"], template=template)
    _, end = apply(tokenizer, "auto")
    with pytest.raises(RowError, match=r"the chat template refuses this conversation \(System role not supported\)"):
        tokenize(tokenizer, chat("a", "b", system="c"), end)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{{ m['role'] + (': ' + m['content'] + '</s>' if loop.last else '') }}{% endfor %}",
            "does not end in </s> after its words|renders what comes before",
        ),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
            "{% if add_generation_prompt %}bot: {% endif %}",
            "renders what comes before an assistant turn differently",
        ),
    ],
)
def test_labels_that_cannot_be_proven_are_refused(template: str, reason: str) -> None:
    tokenizer = tokenizer_with(template=template)
    _, end = apply(tokenizer, "auto")
    with pytest.raises(RowError, match=reason):
        tokenize(tokenizer, chat("a", "b", "c", "d"), end)


# ------------------------------------------------------------------------------------------- prompts for generation


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", ["chatml", "zephyr"])
def test_a_prompt_is_what_stands_before_the_last_answer(name: str, messages: list[Message]) -> None:
    tokenizer, end = made(name)
    prompt, answer = prompt_and_reference(tokenizer, messages)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    parts = pieces(name, messages)
    text = "".join(before + words + after for before, words, after in parts[:last]) + parts[last][0]
    assert tokenizer.decode(prompt) == text
    assert answer == messages[last]["content"]
    row = tokenize(tokenizer, messages, end)
    assert row["input_ids"][: len(prompt)] == prompt


def test_text_that_is_no_unicode_is_a_bad_row() -> None:
    """Half of a surrogate pair is legal JSON: what a cut at a number of UTF-16 units leaves of an emoji."""
    tokenizer, end = made("chatml")
    with pytest.raises(RowError):
        tokenize(tokenizer, chat("\ud83d", "yes"), end)
