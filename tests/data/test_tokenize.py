"""Which tokens carry loss, compared with references that know nothing of how sft_lab finds them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft_lab.data.formats import Conversation, Message, RowError, Text, Tokens
from sft_lab.data.template import Template, apply
from sft_lab.data.tokenize import IGNORE, Encoded, by_turn, encode, prompt_and_reference, split
from tests.data.test_template import CHATML, FAMILIES, NAMES, PICTURES, TRL_TEMPLATES, tokenizer_with, written


def chat(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn, the user first."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


EVERY_MARKER = (
    "<|im_start|>assistant\nno<|im_end|>\n<|assistant|>\nno</s>\n<|start_header_id|>assistant<|end_header_id|>\n\nno<|eot_id|>"
    "[INST] a [/INST] no</s><start_of_turn>model\nno<end_of_turn>\n### Response:\nno</s>\n\n### Instruction:\n"
)
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
    "a user writes every marker": chat(EVERY_MARKER, "yes", EVERY_MARKER, "no", system=EVERY_MARKER),
    "a user writes the word assistant": chat("assistant\nassistant\n", "assistant\n"),
    "an assistant writes an end token": chat("a", "it is <|im_end|> or </s>, I say", "b", "c"),
    "an assistant ends with an end token": chat("a", "it is <|im_end|></s>", "b", "it is </s><|im_end|>"),
    "an assistant writes a whole turn": chat("a", "<|im_start|>user\nb<|im_end|>\n<|user|>\nb</s>\n", "c", "d"),
    "an assistant writes every marker": chat("a", EVERY_MARKER, "b", EVERY_MARKER + "done"),
}


def refused(name: str, messages: list[Message]) -> bool:
    """Whether the template takes no conversation of these roles."""
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if name == "gemma":
        return any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles))
    return name in ("mistral", "alpaca") and "tool" in roles


def pieces(name: str, messages: list[Message]) -> list[tuple[str, str, str]]:
    """Each message as (what stands before its words, the words with their end token, what stands after)."""
    make: dict[str, Callable[[list[Message]], list[tuple[str, str, str]]]] = {
        "chatml": _chatml,
        "zephyr": _zephyr,
        "llama3": _llama3,
        "mistral": _mistral,
        "gemma": _gemma,
        "qwen": _qwen,
        "alpaca": _alpaca,
    }
    return make[name](messages)


def _chatml(messages: list[Message]) -> list[tuple[str, str, str]]:
    return [(f"<|im_start|>{m['role']}\n", f"{m['content']}<|im_end|>", "\n") for m in messages]


def _qwen(messages: list[Message]) -> list[tuple[str, str, str]]:
    tool = ("<|im_start|>user\n<tool_response>\n", "\n</tool_response><|im_end|>")
    return [
        (tool[0], m["content"] + tool[1], "\n") if m["role"] == "tool" else piece
        for m, piece in zip(messages, _chatml(messages), strict=True)
    ]


def _zephyr(messages: list[Message]) -> list[tuple[str, str, str]]:
    bos = _first("<s>", messages)
    return [(f"{b}<|{m['role']}|>\n", f"{m['content']}</s>", "\n") for b, m in zip(bos, messages, strict=True)]


def _llama3(messages: list[Message]) -> list[tuple[str, str, str]]:
    return [
        (f"{b}<|start_header_id|>{m['role']}<|end_header_id|>\n\n", f"{m['content'].strip()}<|eot_id|>", "")
        for b, m in zip(_first("<s>", messages), messages, strict=True)
    ]


def _gemma(messages: list[Message]) -> list[tuple[str, str, str]]:
    made, head = [], "<s>"
    for m in messages:
        if m["role"] == "system":
            system, words = m["content"] + "\n\n", ""
            made.append(("", "", ""))
            continue
        role = {"assistant": "model"}.get(m["role"], m["role"])
        system = system if len(made) == 1 and messages[0]["role"] == "system" else ""
        words = m["content"].strip() + "<end_of_turn>"
        made.append((f"{head}<start_of_turn>{role}\n{system}", words, "\n"))
        head = ""
    return made


def _mistral(messages: list[Message]) -> list[tuple[str, str, str]]:
    made, head, system = [], "<s>", ""
    for m, after in zip(messages, [*messages[1:], {"role": ""}], strict=True):
        if m["role"] == "system" and after["role"] == "user":
            system = m["content"] + "\n\n"
            made.append(("", "", ""))
        elif m["role"] == "assistant":
            made.append((head, f" {m['content']}</s>", ""))
            head = ""
        else:
            made.append((f"{head}[INST] {system}", f"{m['content']} [/INST]", ""))
            head = system = ""
    return made


def _alpaca(messages: list[Message]) -> list[tuple[str, str, str]]:
    known = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    heads = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
    first = _first("" if messages[0]["role"] == "system" else known, messages)
    return [
        (f + heads[m["role"]], m["content"] + ("</s>" if m["role"] == "assistant" else ""), "\n\n")
        for f, m in zip(first, messages, strict=True)
    ]


def _first(text: str, messages: list[Message]) -> list[str]:
    return [text, *[""] * (len(messages) - 1)]


def reference(name: str, tokenizer: Any, messages: list[Message]) -> tuple[str, list[int]]:
    """The text that the template must give, and labels by where each token's characters lie in it."""
    text, trained = "", set()
    for (before, words, after), message in zip(pieces(name, messages), messages, strict=True):
        start = len(text) + len(before)
        text += before + words + after
        if message["role"] == "assistant" and message.get("weight", 1):
            assert text.find(words, start) == start
            trained |= set(range(start, start + len(words)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return text, [
        id_ if set(range(*offset)) and set(range(*offset)) <= trained else IGNORE
        for id_, offset in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


@functools.cache
def made(name: str, have: bool = True, **options: Any) -> tuple[PreTrainedTokenizerFast, Template]:
    """A tokenizer with the template of that name; `have`: it had every marker of every template as a token before."""
    every = [*dict.fromkeys(itertools.chain(*NAMES.values())), "[INST]", "[/INST]"]
    tokenizer = tokenizer_with(*(every if have else []), **options)
    return tokenizer, apply(tokenizer, name)


def encoded(name: str, messages: list[Message], loss: str = "assistant", have: bool = True, **options: Any) -> Encoded:
    tokenizer, template = made(name, have, **options)
    return encode(tokenizer, Conversation(messages), template, loss)


def learned(tokenizer: Any, row: Encoded) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORE])


# --------------------------------------------------------------------------------------------- spans, template by template


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("have", [True, False], ids=["tokens there", "tokens added"])
@pytest.mark.parametrize("name", NAMES)
def test_labels_are_those_of_a_search_in_the_text(name: str, have: bool, messages: list[Message]) -> None:
    tokenizer, template = made(name, have)
    if refused(name, messages):
        with pytest.raises(RowError, match="the chat template refuses this conversation"):
            encode(tokenizer, Conversation(messages), template, "assistant")
        return
    row = encode(tokenizer, Conversation(messages), template, "assistant")
    text, labels = reference(name, tokenizer, messages)
    assert tokenizer.decode(row.input_ids) == text
    assert row.labels == labels
    turns = sum(message["role"] == "assistant" for message in messages)
    assert row.labels.count(template.turn_end.id) >= turns


def said(name: str, messages: list[Message], end: str) -> str:
    """What the assistant's turns are to read as; two templates trim them, one puts a space before."""
    words = [
        m["content"].strip() if name in ("llama3", "gemma") else m["content"]
        for m in messages
        if m["role"] == "assistant"
    ]
    return "".join((" " if name == "mistral" else "") + word + end for word in words)


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_what_carries_loss_reads_as_the_assistants_words_and_their_ends(name: str, messages: list[Message]) -> None:
    """Read back from the token ids, so that it holds whatever the tokenizer says of offsets."""
    if not refused(name, messages):
        tokenizer, template = made(name)
        row = encoded(name, messages)
        assert learned(tokenizer, row) == said(name, messages, template.turn_end.token)
        assert row.labels[0] == IGNORE


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_search_finds_the_spans_that_the_marks_give(name: str, messages: list[Message]) -> None:
    """The same templates without their marks, as most models' own are."""
    if refused(name, messages):
        return
    tokenizer, template = made(name)
    expected = encode(tokenizer, Conversation(messages), template, "assistant")
    unmarked = dataclasses.replace(template, text=without_marks(template.text))
    assert encode(tokenizer, Conversation(messages), unmarked, "assistant") == expected


def without_marks(text: str) -> str:
    text = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", text)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", text)


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_that_puts_bos_itself_changes_no_label(name: str) -> None:
    messages = CONVERSATIONS["many turns and a system prompt"]
    tokenizer, template = made(name, puts_bos=True)
    row = encode(tokenizer, Conversation(messages), template, "assistant")
    text, labels = reference(name, tokenizer, messages)
    bare = text.removeprefix("<s>")
    assert tokenizer.decode(row.input_ids) == "<s>" + bare
    assert row.labels == ([] if text != bare else [IGNORE]) + labels
    assert not {"double_bos", "no_bos"} & {*row.notes}


@pytest.mark.parametrize(
    "messages", [chat("a", "if x:\n    return 1"), CONVERSATIONS["many turns and a system prompt"]]
)
def test_white_space_is_trained_where_offsets_leave_it_out(messages: list[Message]) -> None:
    """GPT-NeoX's tokenizer, and Pythia's, gives a token of spaces alone the empty range of characters."""
    tokenizer, _ = made("chatml", trim_offsets=True)
    row = encoded("chatml", messages, trim_offsets=True)
    assert learned(tokenizer, row) == said("chatml", messages, "<|im_end|>")


def test_a_space_of_the_header_is_not_trained_where_offsets_leave_it_out() -> None:
    text = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = tokenizer_with(template=text, trim_offsets=True)
    row = encode(tokenizer, Conversation(chat("a", "(b)")), apply(tokenizer, "auto"), "assistant")
    assert learned(tokenizer, row) == "(b)</s>"


def test_an_end_token_that_takes_in_the_line_break_behind_it_is_trained() -> None:
    """Phi-3's do."""
    tokenizer = tokenizer_with("<|im_start|>")
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True, normalized=False, rstrip=True)], special_tokens=True)
    template = apply(tokenizer, "chatml")
    row = encode(tokenizer, Conversation(chat("a", "b", "c", "d")), template, "assistant")
    assert learned(tokenizer, row) == "b<|im_end|>d<|im_end|>"


def sentencepiece_like(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=[*string.printable, "▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["<|assistant|>\n<|user|>\n", "hello good day"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("spaces", ["prepend", "first", "always"])
@pytest.mark.parametrize("template", ["zephyr", "mistral", "chatml"])
@pytest.mark.parametrize(
    "name", ["one turn", "many turns and a system prompt", "empty assistant turns", "twice the same"]
)
def test_labels_of_a_tokenizer_that_puts_a_space_before_its_text(name: str, template: str, spaces: str) -> None:
    """Llama 2's and Mistral's do: after each special token or only at the start, in one place of the file or another."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    if spaces == "prepend":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces)
    tokenizer = sentencepiece_like(bpe)
    used = apply(tokenizer, template)
    row = encode(tokenizer, Conversation(CONVERSATIONS[name]), used, "assistant")
    tokens = tokenizer.convert_ids_to_tokens([label for label in row.labels if label != IGNORE])
    assert "".join(tokens).replace("▁", " ") == said(template, CONVERSATIONS[name], used.turn_end.token)


def test_line_breaks_shared_with_the_header_are_not_trained() -> None:
    """`assistant\\n` and an answer that begins with a line break become one token, which the model never writes."""
    tokenizer, _ = made("chatml")
    row = encoded("chatml", chat("a", "\n\nhello"))
    text, labels = reference("chatml", tokenizer, chat("a", "\n\nhello"))
    assert (tokenizer.decode(row.input_ids), row.labels) == (text, labels)
    assert row.notes == ["prompt_tokens_differ"]


# ------------------------------------------------------------------------------------------------------- what is learned

THREE = [*chat("a", "one", "b", "two", "c", "three", system="S")]


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_learns_its_turns(name: str) -> None:
    tokenizer, template = made(name)
    end = template.turn_end.token

    def turns(loss: str, messages: list[Message] = THREE, completion_from: int = 4) -> str:
        row = encode(tokenizer, Conversation(messages, completion_from=completion_from), template, loss)
        return learned(tokenizer, row).replace(" ", "")

    assert turns("assistant") == f"one{end}two{end}three{end}"
    assert turns("completion") == f"two{end}three{end}"
    assert turns("last_turn") == f"three{end}"
    assert turns("last_turn", [*THREE, *chat("d")]) == f"three{end}"
    weighted = [{**m, "weight": 0} if m["content"] == "two" else m for m in THREE]
    assert turns("assistant", weighted) == f"one{end}three{end}"
    assert turns("completion", weighted) == f"three{end}"


@pytest.mark.parametrize("name", NAMES)
def test_all_learns_every_token_but_the_first(name: str) -> None:
    row = encoded(name, THREE, "all")
    assert row.labels == [IGNORE, *row.input_ids[1:]]
    assert row.input_ids == encoded(name, THREE).input_ids
    assert row.turns == [(message["role"], True) for message in THREE]


def test_turns_tell_which_messages_are_learned() -> None:
    assert encoded("chatml", chat("a", "b", "c", "d"), "last_turn").turns == [
        ("user", False),
        ("assistant", False),
        ("user", False),
        ("assistant", True),
    ]


@pytest.mark.parametrize(
    ("messages", "loss"),
    [
        (chat("a"), "assistant"),
        ([chat("a", "b")[0], {"role": "assistant", "content": "b", "weight": 0}], "assistant"),
        ([*chat("a", "b", "c"), {"role": "assistant", "content": "d", "weight": 0}], "last_turn"),
        (chat("a", "b", "c"), "completion"),
    ],
)
def test_a_row_without_a_turn_to_learn_is_a_bad_row(messages: list[Message], loss: str) -> None:
    tokenizer, template = made("chatml")
    with pytest.raises(RowError, match=f"no assistant turn to learn with loss={loss}"):
        encode(tokenizer, Conversation(messages, completion_from=2), template, loss)


@pytest.mark.parametrize("loss", ["all", "assistant"])
@pytest.mark.parametrize("puts_bos", [True, False])
def test_a_plain_text_is_learned_up_to_its_end_of_sequence(puts_bos: bool, loss: str) -> None:
    tokenizer, template = made("chatml", puts_bos=puts_bos)
    for text in ("hello day", "hello day</s>", *(["<s>hello day"] if puts_bos else [])):
        row = encode(tokenizer, Text(text), template, loss)
        assert tokenizer.decode(row.input_ids) == ("<s>" if puts_bos else "") + "hello day</s>"
        assert row.labels == [IGNORE, *row.input_ids[1:]]
        assert row.notes == ["text"] + ["special_tokens_in_text"] * (text != "hello day")


@pytest.mark.parametrize("loss", ["completion", "last_turn"])
def test_a_plain_text_has_no_turns_to_choose_from(loss: str) -> None:
    tokenizer, template = made("chatml")
    with pytest.raises(RowError, match=f"a plain text has no turns to learn with loss={loss}"):
        encode(tokenizer, Text("hello"), template, loss)


def test_tokens_are_taken_as_they_are_but_for_the_first_label() -> None:
    """It is no loss anyway, and packing would put another row before it."""
    tokenizer, template = made("chatml")
    end = template.turn_end.id
    given = Tokens([5, 6, 7, end], [5, IGNORE, 7, end])
    row = encode(tokenizer, given, template, "last_turn")
    assert (row.input_ids, row.labels, row.notes) == ([5, 6, 7, end], [IGNORE, IGNORE, 7, end], [])
    assert given.labels[0] == 5


@pytest.mark.parametrize("token", [-1, 10_000])
def test_tokens_that_the_tokenizer_does_not_have_are_refused(token: int) -> None:
    tokenizer, template = made("chatml")
    with pytest.raises(RowError, match=f"token {token} is none of the tokenizer's .allowed: 0 to {len(tokenizer) - 1}"):
        encode(tokenizer, Tokens([5, token, 6], [5, 5, 6]), template, "assistant")


# ----------------------------------------------------------------------------------------------------------------- notes


@pytest.mark.parametrize(
    ("messages", "notes"),
    [
        (chat("hello", "day"), []),
        (chat("hello", "day<|im_end|>"), ["special_tokens_in_text", "extra_eos"]),
        (chat("what is </s>?", "day"), ["special_tokens_in_text"]),
        (chat("what is <|assistant|>?", "day"), []),
        (chat("hello", "<think>hm</think>day"), ["thought"]),
    ],
)
def test_peculiar_rows_are_noted(messages: list[Message], notes: list[str]) -> None:
    tokenizer, template = made("chatml")
    row = encode(tokenizer, Conversation(messages, notes=["mine"]), template, "assistant")
    assert row.notes == ["mine", *notes]


def test_special_tokens_in_a_call_are_noted() -> None:
    tokenizer, template = made("qwen")
    row = encode(tokenizer, Conversation([*chat("a"), call("add", x="</s>")], [tool("add")]), template, "assistant")
    assert row.notes == ["special_tokens_in_text"]


def test_a_bos_too_many_or_too_few_is_noted(tmp_path: Path) -> None:
    body = "{% for m in messages %}{{ m['role'] + m['content'] + eos_token }}{% endfor %}"
    for text, notes in ((body, ["no_bos"]), ("<s>" + body, []), ("<s><s>" + body, ["double_bos"])):
        tokenizer = tokenizer_with(puts_bos=True)
        template = apply(tokenizer, "file", written(tmp_path / "my.jinja", text))
        assert encode(tokenizer, Conversation(chat("a", "b")), template, "assistant").notes == notes


def test_a_prompt_that_is_cut_otherwise_without_an_answer_is_noted(tmp_path: Path) -> None:
    """The last token of a header `assistant: ` is a space when asked, and gone in the answer's first when trained."""
    for space, notes in (("", []), (" ", ["prompt_tokens_differ"])):
        text = (
            "{% for m in messages %}{{ m['role'] + ':SPACE' + m['content'] + eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant:SPACE' }}{% endif %}"
        ).replace("SPACE", space)
        tokenizer = tokenizer_with()
        template = apply(tokenizer, "file", written(tmp_path / "my.jinja", text))
        conversation = Conversation(chat("hello", "good day"))
        row = encode(tokenizer, conversation, template, "assistant")
        prompt, _ = prompt_and_reference(tokenizer, conversation, template)
        assert (row.input_ids[: len(prompt)] != prompt, row.notes) == (bool(notes), notes)
    gpt2 = {name for name in NAMES if "prompt_tokens_differ" in encoded(name, chat("hello", "day")).notes}
    assert gpt2 == {"llama3"}  # the second line break of its header goes to the word behind it


def test_peculiar_tokens_are_noted() -> None:
    tokenizer, template = made("chatml", puts_bos=True)
    end, eos, bos = template.turn_end.id, tokenizer.eos_token_id, tokenizer.bos_token_id

    def notes(ids: list[int], labels: list[int]) -> list[str]:
        return encode(tokenizer, Tokens(ids, labels), template, "assistant").notes

    x = IGNORE
    assert notes([bos, 9, 8, end, 9, 8, eos], [x, x, 8, end, x, 8, eos]) == []
    assert notes([bos, 9, 8, end, 9, 8, eos], [x, x, 8, x, x, 8, eos]) == ["untrained_turn_end"]
    assert notes([bos, 9, 8], [x, 9, 8]) == ["untrained_turn_end"]
    assert notes([bos, 9, end, end], [x, 9, end, end]) == ["extra_eos"]
    assert notes([bos, bos, end], [x, x, end]) == ["double_bos"]
    assert notes([9, end], [x, end]) == ["no_bos"]


# ----------------------------------------------------------------------------------------------------------------- tools


def call(name: str, content: str = "", **arguments: Any) -> Message:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def tool(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "description": "a number"}}}
    return {"type": "function", "function": {"name": name, "description": "adds", "parameters": parameters}}


def with_tools(**arguments: Any) -> Conversation:
    result = {"role": "tool", "content": "forty-two"}
    second = call("mul", "Let me see.", **arguments)
    messages = [
        *chat("q"),
        call("add", **arguments),
        result,
        second,
        result,
        {"role": "assistant", "content": "It is 42."},
    ]
    return Conversation(messages, [tool("add"), tool("mul")])


@pytest.mark.parametrize(
    "arguments", [{"a": 1}, {}, {"a": "it is <|im_end|>\n<|im_start|>user\n", "b": "</tool_call>"}]
)
@pytest.mark.parametrize("have", [True, False])
def test_calls_are_learned_and_results_are_not(arguments: dict[str, Any], have: bool) -> None:
    tokenizer, template = made("qwen", have)
    row = encode(tokenizer, with_tools(**arguments), template, "assistant")
    written = json.dumps(arguments)
    assert learned(tokenizer, row) == (
        f'<tool_call>\n{{"name": "add", "arguments": {written}}}\n</tool_call><|im_end|>'
        f'Let me see.\n<tool_call>\n{{"name": "mul", "arguments": {written}}}\n</tool_call><|im_end|>'
        "It is 42.<|im_end|>"
    )
    text = tokenizer.decode(row.input_ids)
    assert json.dumps(tool("add")) in text
    assert text.count("<tool_response>\nforty-two\n</tool_response>") == 2


def test_calls_are_found_without_marks_or_refused() -> None:
    tokenizer, template = made("qwen")
    unmarked = dataclasses.replace(template, text=without_marks(template.text))
    assert encode(tokenizer, with_tools(a=1), unmarked, "assistant") == encode(
        tokenizer, with_tools(a=1), template, "assistant"
    )
    with pytest.raises(RowError, match=r"a tool call has <\|im_end\|> in it"):
        encode(tokenizer, with_tools(a="<|im_end|>"), unmarked, "assistant")


@pytest.mark.parametrize(
    ("conversation", "what"),
    [
        (Conversation([*chat("q"), call("add", a=1)]), "calls"),
        (Conversation([*chat("what is add?"), call("add", "I call add")]), "calls"),
        (Conversation(chat("what is add?", "add!"), [tool("add")]), "definitions"),
    ],
)
@pytest.mark.parametrize("loss", ["assistant", "all"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen"])
def test_what_a_template_would_leave_out_of_tools_is_refused(
    name: str, loss: str, conversation: Conversation, what: str
) -> None:
    tokenizer, template = made(name)
    with pytest.raises(RowError, match=f"the chat template writes no tool {what} .chat_template=qwen does"):
        encode(tokenizer, conversation, template, loss)


def test_results_that_a_template_would_leave_out_are_refused() -> None:
    """Phi-3's passes over every role that it does not know."""
    own = (TRL_TEMPLATES / "phi3.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", template=own)
    with pytest.raises(RowError, match="the chat template writes no tool results"):
        encode(tokenizer, Conversation(CONVERSATIONS["tool"]), apply(tokenizer, "auto"), "assistant")


# ------------------------------------------------------------------------------------------------- templates in the wild

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


# Qwen3's own writes an empty thought before the last answer alone: another text than the marked one.
PAIRS = [pair for pair in itertools.product(SPECIAL, ("auto", "file")) if pair != ("qwen3", "file")]


@pytest.mark.parametrize("messages", WILD.values(), ids=WILD)
@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_labels_are_those_that_trl_marks_in_the_families_own_templates(
    family: str, name: str, messages: list[Message]
) -> None:
    """TRL ships each family's template, and one that marks what the assistant says by {% generation %}."""
    own, marked = (TRL_TEMPLATES / f"{family}{kind}.jinja" for kind in ("", "_training"))
    tokenizer = tokenizer_with(*SPECIAL[family], template=own.read_text(encoding="utf-8"))
    template = apply(tokenizer, name, str(own) if name == "file" else "")
    row = encode(tokenizer, Conversation(messages), template, "assistant")
    expected = tokenizer.apply_chat_template(
        messages, chat_template=marked.read_text(encoding="utf-8"), return_dict=True, return_assistant_tokens_mask=True
    )
    assert row.input_ids == list(expected["input_ids"])
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    spans = []
    for inside, pairs in itertools.groupby(
        zip(expected["input_ids"], expected["assistant_masks"], strict=True), key=lambda pair: pair[1]
    ):
        span = [id_ for id_, _ in pairs]
        if inside and template.turn_end.id in span:  # some of the templates mark the header's line break too, and what
            spans += span[span[:1] == line_break : span.index(template.turn_end.id) + 1]  # follows the end token
    assert [label for label in row.labels if label != IGNORE] == spans


THOUGHTS = {
    "plain": (chat("a", "first", "b", "second"), "first<|im_end|><think>\n\n</think>\n\nsecond<|im_end|>", []),
    "empty": (chat("a", "", "b", ""), "<|im_end|><think>\n\n</think>\n\n<|im_end|>", []),
    "thinking": (
        chat("a", "<think>\nhm\n</think>\n\nfirst", "b", "<think>\nwell\n</think>\n\nthink"),
        "first<|im_end|><think>\nwell\n</think>\n\nthink<|im_end|>",
        ["thought", "thought_left_out"],
    ),
}


@pytest.mark.parametrize(("messages", "trained", "notes"), THOUGHTS.values(), ids=THOUGHTS)
def test_qwen3s_own_template_thinks_before_the_last_answer_alone(
    messages: list[Message], trained: str, notes: list[str]
) -> None:
    """Taken as a file: TRL's version for training, which writes every thought, is taken for the model's own."""
    tokenizer = tokenizer_with(*CHATML)
    template = apply(tokenizer, "file", str(TRL_TEMPLATES / "qwen3.jinja"))
    row = encode(tokenizer, Conversation(messages), template, "assistant")
    assert (learned(tokenizer, row), row.notes) == (trained, notes)


def test_qwen3_thinks_in_every_turn_of_its_training_version() -> None:
    """Empty where the data has no thought, as the model is made to answer at once. Asked, it sees no earlier thought."""
    own = (TRL_TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(*CHATML, template=own)
    conversation = Conversation(chat("a", "first", "b", "<think>\nwell\n</think>\n\nsecond"))
    row = encode(tokenizer, conversation, apply(tokenizer, "auto"), "assistant")
    assert (
        learned(tokenizer, row) == "<think>\n\n</think>\n\nfirst<|im_end|><think>\nwell\n</think>\n\nsecond<|im_end|>"
    )
    assert row.notes == ["context_differs", "thought"]


ASKED = {
    "two turns": Conversation(chat("Q1", "first", "Q2", "second")),
    "empty turns": Conversation(chat("Q1", "", "Q2", "")),
    "thoughts": Conversation(chat("Q1", "<think>\nhm\n</think>\n\nfirst", "Q2", "<think>\nwell\n</think>\n\nsecond")),
    "end tokens": Conversation(chat("Q1", "END and END", "Q2", "it is END")),
    "tools": with_tools(a=1),
}


@pytest.mark.parametrize("loss", ["assistant", "last_turn"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PICTURES])
def test_marks_and_search_agree_on_every_template_that_trl_ships(family: str, loss: str, tmp_path: Path) -> None:
    """Or refuse, the search more often: where calls or earlier turns end in another token, or a prompt begins a thought."""
    marked = (TRL_TEMPLATES / f"{family}_training.jinja").read_text(encoding="utf-8")
    tokens = sorted({*re.findall(r"<[|｜]?[\w▁]+[|｜]?>", marked)} - {"<s>", "</s>"})
    tokenizer = tokenizer_with(*tokens)
    template = apply(tokenizer, "file", written(tmp_path / "my.jinja", marked))
    searched = dataclasses.replace(template, text=without_marks(marked))
    for name, conversation in ASKED.items():
        messages = json.loads(json.dumps(conversation.messages).replace("END", template.turn_end.token))
        rows = [outcome(tokenizer, Conversation(messages, conversation.tools), t, loss) for t in (template, searched)]
        assert rows[1] == rows[0] or isinstance(rows[1], str), name
        if isinstance(rows[0], Encoded):
            text = learned(tokenizer, rows[0])
            turns = sum(message["role"] == "assistant" for message in messages) if loss == "assistant" else 1
            assert text.endswith(template.turn_end.token)
            ends = {template.turn_end.token, *(["<|observation|>"] if family == "glm4moe" else [])}
            ends |= {"<|end|>", "<|call|>"} if family == "gptoss" else set()
            assert sum(map(text.count, ends)) >= turns
            assert not any(word in text for word in ("Q1", "Q2", "forty-two"))
    if not family.startswith(
        ("deepseek", "nemotron")
    ):  # they prompt with the start of a thought, and drop an empty one
        assert isinstance(outcome(tokenizer, ASKED["two turns"], template, "last_turn"), Encoded)


def outcome(tokenizer: Any, conversation: Conversation, template: Template, loss: str) -> Encoded | str:
    try:
        return encode(tokenizer, conversation, template, loss)
    except RowError as error:
        return str(error)


def test_turns_that_end_in_another_token_than_an_answer_are_noted() -> None:
    """GPT-OSS closes earlier turns with a token at which nothing stops. Apart, each ends as it does when it is the last."""
    own = (TRL_TEMPLATES / "gptoss.jinja").read_text(encoding="utf-8")
    tokens = ["<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>"]
    tokenizer = tokenizer_with(*tokens, template=own)
    template = apply(tokenizer, "auto")
    for contents in (("a", "first", "b", "second"), ("a", "", "b", "")):
        row = encode(tokenizer, Conversation(chat(*contents)), template, "last_turn")
        assert learned(tokenizer, row) == f"<|channel|>final<|message|>{contents[-1]}<|return|>"
        assert row.notes == []
        both = encode(tokenizer, Conversation(chat(*contents)), template, "assistant")
        final = "<|channel|>final<|message|>"
        assert learned(tokenizer, both) == f"{final}{contents[1]}<|end|>{final}{contents[3]}<|return|>"
        assert both.notes == ["other_turn_end"]
        apart = by_turn(tokenizer, Conversation(chat(*contents)), template, "assistant")
        assert [learned(tokenizer, one) for one in apart] == [f"{final}{contents[i]}<|return|>" for i in (1, 3)]
        assert [one.notes for one in apart] == [[], []]


def test_a_conversation_that_the_template_refuses_is_a_bad_row() -> None:
    template = (TRL_TEMPLATES / "gemma.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(*SPECIAL["gemma"], template=template)
    with pytest.raises(RowError, match=r"the chat template refuses this conversation \(System role not supported\)"):
        encode(tokenizer, Conversation(chat("a", "b", system="c")), apply(tokenizer, "auto"), "assistant")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% for m in messages %}{{ m['role'] + (': ' + m['content'] + '</s>' if loop.last else '') }}{% endfor %}",
            r"leaves out what message 1 \(user\) says",
        ),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
            "{% if add_generation_prompt %}bot: {% endif %}",
            "renders what comes before an assistant turn differently",
        ),
        (  # the words of the first answer are not there, those of the next question are the same
            "{% for m in messages %}{{ '\n' + (m['content'] if loop.index != 2 or loop.last else 'x') + '</s>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '\n' }}{% endif %}",
            "leaves out or rewrites what an assistant turn says",
        ),
    ],
)
def test_labels_that_cannot_be_proven_are_refused(template: str, reason: str) -> None:
    tokenizer = tokenizer_with(template=template)
    used = apply(tokenizer, "auto")
    with pytest.raises(RowError, match=reason):
        encode(tokenizer, Conversation(chat("a", "b", "b", "d")), used, "assistant")


def test_an_empty_answer_that_nothing_ends_does_not_reach_into_the_next_turn() -> None:
    text = (
        "{% for m in messages %}{{ '\n' + m['content'] + ('</s>' if loop.index != 2 or loop.last else '') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n' }}{% endif %}"
    )
    tokenizer = tokenizer_with(template=text)
    used = apply(tokenizer, "auto")
    for question in ("", "b", "s", " s"):
        with pytest.raises(RowError, match="does not end in </s> after its words"):
            encode(tokenizer, Conversation(chat("a", "", question, "d")), used, "assistant")


@pytest.mark.parametrize(
    "answer",
    [
        "{% generation %}{{ head + m['content'] }}{% endgeneration %}{{ '</s>' }}",  # begins too early, leaves the end out
        "{{ head }}{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}",  # as it should be
        "{{ head + m['content'] }}{% generation %}{{ '</s>' }}{% endgeneration %}",  # leaves the words out
        "{{ head + m['content'] + '</s>' }}{% if loop.last %}{% generation %}x{% endgeneration %}{% endif %}",
        # otherwise in the first answer than in later ones: where it begins, and where it ends
        "{% if loop.index <= 3 %}{{ head }}{% endif %}{% generation %}{% if loop.index > 3 %}{{ head }}{% endif %}"
        "{{ m['content'] + '</s>' }}{% endgeneration %}",
        "{% if loop.index > 3 %}{{ head }}{% endif %}{% generation %}{% if loop.index <= 3 %}{{ head }}{% endif %}"
        "{{ m['content'] + '</s>' }}{% endgeneration %}",
        "{{ head }}{% generation %}{{ m['content'] }}{% if loop.index <= 3 %}{{ '</s>' }}{% endif %}{% endgeneration %}"
        "{% if loop.index > 3 %}{{ '</s>' }}{% endif %}",
    ],
)
def test_marks_that_lie_otherwise_change_no_label(answer: str) -> None:
    text = (
        "{% set head = 'assistant:\n' %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + answer
        + "{% else %}"
        "{{ m['role'] + ':\n' + m['content'] + '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ head }}{% endif %}"
    )
    tokenizer = tokenizer_with(template=text)
    messages = chat("hello", "day</s>", "hello day", "", "a", "day day", system="assistant:\n")
    row = encode(tokenizer, Conversation(messages), apply(tokenizer, "auto"), "assistant")
    assert learned(tokenizer, row) == "day</s></s></s>day day</s>"


def test_marks_around_some_of_the_answers_alone_change_no_label() -> None:
    answer = "{{ m['content'] + '</s>' }}"
    text = (
        "{% for m in messages %}{% if loop.last and m['role'] == 'assistant' %}{% generation %}" + answer
        + "{% endgeneration %}{% else %}" + answer + "{% endif %}{% endfor %}"
    )  # fmt: skip
    tokenizer = tokenizer_with(template=text)
    row = encode(tokenizer, Conversation(chat("a", "yes", "b", "yes")), apply(tokenizer, "auto"), "assistant")
    assert learned(tokenizer, row) == "yes</s>yes</s>"


@pytest.mark.parametrize("mark", ["{% generation %}", "{% if true %}"])
def test_what_stands_beside_a_call_and_is_left_out_is_refused(mark: str) -> None:
    """An answer, as by Llama 3.2's template, or a second call."""
    text = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + mark
        + "{{ (m['tool_calls'][0].function.name if m['tool_calls'] else m['content']) + '</s>' }}"
        + mark.replace("{% ", "{% end").replace(" true", "")
        + "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    )
    tokenizer = tokenizer_with(template=text)
    template = apply(tokenizer, "auto")
    row = encode(tokenizer, Conversation([*chat("q"), call("add")]), template, "assistant")
    assert learned(tokenizer, row) == "add</s>"
    with pytest.raises(RowError, match="leaves out or rewrites what an assistant turn says"):
        encode(tokenizer, Conversation([*chat("q"), call("add", "I add.")]), template, "assistant")
    both = {**call("add"), "tool_calls": [*call("add")["tool_calls"], *call("mul")["tool_calls"]]}
    with pytest.raises(RowError, match="writes no tool calls"):
        encode(tokenizer, Conversation([*chat("q"), both]), template, "assistant")


def test_a_question_that_the_template_leaves_out_is_refused() -> None:
    text = "{% for m in messages %}{{ (m['content'] if loop.index < 3 else '?') + '</s>' }}{% endfor %}"
    tokenizer = tokenizer_with(template=text)
    with pytest.raises(RowError, match=r"leaves out what message 3 \(user\) says"):
        encode(tokenizer, Conversation(chat("a", "b", "c")), apply(tokenizer, "auto"), "assistant")


def test_no_tools_are_no_empty_list_of_tools() -> None:
    """Llama 3.2's own template makes much of such a list."""
    own = (TRL_TEMPLATES / "llama3_2.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(*SPECIAL["llama3"], template=own)
    template = apply(tokenizer, "auto")
    conversation = Conversation(chat("a", "b"))
    prompt, _ = prompt_and_reference(tokenizer, conversation, template)
    for ids in (prompt, encode(tokenizer, conversation, template, "assistant").input_ids):
        assert "Environment" not in tokenizer.decode(ids)


def test_calls_of_qwen25_with_an_end_token_in_them_are_found_by_its_marks() -> None:
    """They take in the header's line break; a search could not tell where the turn ends."""
    own = (TRL_TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(*CHATML, template=own)
    row = encode(tokenizer, with_tools(a="<|im_end|>"), apply(tokenizer, "auto"), "last_turn")
    assert learned(tokenizer, row) == "It is 42.<|im_end|>"
    conversation = Conversation([*chat("q"), call("add", a="<|im_end|>")], [tool("add")])
    row = encode(tokenizer, conversation, apply(tokenizer, "auto"), "assistant")
    assert (
        learned(tokenizer, row)
        == '<tool_call>\n{"name": "add", "arguments": {"a": "<|im_end|>"}}\n</tool_call><|im_end|>'
    )


# ---------------------------------------------------------------------------------------------- prompts for generation


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_what_stands_before_the_last_answer(name: str, messages: list[Message]) -> None:
    if refused(name, messages):
        return
    tokenizer, template = made(name)
    prompt, answer = prompt_and_reference(tokenizer, Conversation(messages), template)
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    parts = pieces(name, messages)
    text = "".join(before + words + after for before, words, after in parts[:last]) + parts[last][0]
    assert tokenizer.decode(prompt) == text
    row = encoded(name, messages, "last_turn")
    written = [label for label in row.labels if label != IGNORE][:-1]
    assert answer == tokenizer.decode(written, skip_special_tokens=True)
    assert (
        answer.strip()
        == tokenizer.decode(
            tokenizer(messages[last]["content"], add_special_tokens=False)["input_ids"], skip_special_tokens=True
        ).strip()
    )
    assert row.input_ids[: len(prompt)] == prompt or "prompt_tokens_differ" in row.notes


def test_the_reference_of_a_call_is_as_the_model_is_to_write_it() -> None:
    tokenizer, template = made("qwen")
    conversation = Conversation([*chat("q"), call("add", "I add.", a=1), *chat("and?")], [tool("add")])
    prompt, answer = prompt_and_reference(tokenizer, conversation, template)
    assert answer == 'I add.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert json.dumps(tool("add")) in tokenizer.decode(prompt)


def test_nothing_can_be_asked_where_nothing_comes_before_the_answer() -> None:
    tokenizer, template = made("chatml")
    with pytest.raises(RowError, match="nothing comes before the answer"):
        prompt_and_reference(tokenizer, Conversation([{"role": "assistant", "content": "Welcome!"}]), template)


def test_text_that_is_no_unicode_is_a_bad_row() -> None:
    """Half of a surrogate pair is legal JSON: what a cut at a number of UTF-16 units leaves of an emoji."""
    tokenizer, template = made("chatml")
    for example in (Conversation(chat("\ud83d", "yes")), Text("\ud83d")):
        with pytest.raises(RowError, match="no valid Unicode"):
            encode(tokenizer, example, template, "assistant")


# ------------------------------------------------------------------------------------------------------- long conversations


def contents(pieces: list[Conversation]) -> list[str]:
    return ["".join(message["content"] for message in piece.messages) for piece in pieces]


LONG = Conversation(chat("a", "1", "b", "2", "c", "3", "d", "4", system="S"), [tool("add")], 5, ["mine"])


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (9, ["Sa1b2c3d4"]),
        (7, ["Sa1b2c3", "Sd4"]),
        (5, ["Sa1b2", "Sc3d4"]),
        (3, ["Sa1", "Sb2", "Sc3", "Sd4"]),
        (2, ["Sa1", "Sb2", "Sc3", "Sd4"]),  # none fits, each comes back by itself
    ],
)
def test_a_long_conversation_is_split_between_exchanges(most: int, expected: list[str]) -> None:
    found = split(LONG, lambda piece: len(piece.messages) <= most)
    assert contents(found) == expected
    assert all(piece.tools == LONG.tools and piece.notes == ["mine"] for piece in found)
    assert LONG.messages[-1]["content"] == "4"  # as it was


def test_pieces_keep_what_the_completion_is() -> None:
    found = split(LONG, lambda piece: len(piece.messages) <= 5)
    assert [piece.completion_from for piece in found] == [5, 1]  # from "c" on: nothing of the first, all of the second
    assert contents(split(LONG, lambda piece: len(piece.messages) <= 5, "completion")) == ["Sc3d4"]
    assert [
        piece.completion_from for piece in split(dataclasses.replace(LONG, completion_from=0), lambda piece: False)
    ] == [0] * 4


def test_pieces_that_teach_nothing_are_left_out() -> None:
    messages = [{**m, "weight": 0} if m["content"] == "2" else m for m in [*LONG.messages, *chat("e")]]
    found = split(Conversation(messages), lambda piece: False)
    assert contents(found) == ["Sa1", "Sc3", "Sd4"]
    assert contents(split(Conversation(messages), lambda piece: False, "last_turn")) == ["Sd4"]


def test_an_exchange_is_never_torn() -> None:
    result = {"role": "tool", "content": "r"}
    messages = [
        *[
            {"role": "assistant", "content": "w"},
            *chat("a"),
            call("add", "c"),
            result,
            {"role": "assistant", "content": "1"},
        ],
        *[{"role": "user", "content": "b"}, *chat("b", "2"), {"role": "assistant", "content": "2"}],
    ]
    assert contents(split(Conversation(messages), lambda piece: False)) == ["w", "acr1", "bb22"]


def test_pieces_are_as_long_as_the_trained_rows_may_be() -> None:
    tokenizer, template = made("chatml")
    plain = dataclasses.replace(LONG, tools=[])

    def length(piece: Conversation) -> int:
        return len(encode(tokenizer, piece, template, "all").input_ids)

    limit = length(plain) // 2 + 8
    found = split(plain, lambda piece: length(piece) <= limit)
    assert len(found) == 2
    assert all(length(piece) <= limit for piece in found)
