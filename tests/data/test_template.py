"""Chat templates on real small tokenizers: what ends a turn, tokens that come along, BOS, and a pad that ends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from sft_lab.data.template import apply
from sft_lab.errors import PreflightError

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
GEMMA = ["<start_of_turn>", "<end_of_turn>"]
# The templates by name, and the tokens that each brings along.
NAMES = {"chatml": CHATML, "zephyr": [], "llama3": LLAMA3, "mistral": [], "gemma": GEMMA, "qwen": CHATML, "alpaca": []}
HELLO = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
TALK = [{"role": "system", "content": "S"}, *HELLO, {"role": "user", "content": "and?"}]
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


def tokenizer_with(
    *tokens: str,
    bos: str | None = "<s>",
    eos: str | None = "</s>",
    pad: str | None = None,
    template: Any = None,
    trim_offsets: bool = False,
    puts_bos: bool = False,
    vocabulary: tuple[str, ...] = ("<s>", "</s>"),
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few merges with those of `vocabulary` and `tokens` as special tokens.

    trim_offsets: character offsets leave out a token's white space, as GPT-NeoX's do.
    puts_bos: it begins every text with <s>, as Llama's does.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    if trim_offsets:
        bpe.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*vocabulary, *tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(
        ["assistant user system\n\n    return hello\n\n good day, what is the answer?"] * 3, trainer
    )
    if puts_bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=template
    )


def rendered(tokenizer: Any, text: str | None = None, prompt: bool = True) -> str:
    return tokenizer.apply_chat_template(TALK, chat_template=text, tokenize=False, add_generation_prompt=prompt)


def written(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------------- what it is


@pytest.mark.parametrize(
    ("name", "tokenizer", "end"),
    [
        ("chatml", {"tokens": CHATML}, "<|im_end|>"),
        ("chatml", {"tokens": CHATML, "eos": "<|im_end|>"}, "<|im_end|>"),
        ("chatml", {"tokens": [], "eos": None}, "<|im_end|>"),
        ("zephyr", {"tokens": []}, "</s>"),
        ("zephyr", {"tokens": CHATML, "template": LLAMA2}, "</s>"),
        ("llama3", {"tokens": []}, "<|eot_id|>"),
        ("mistral", {"tokens": ["[INST]", "[/INST]"]}, "</s>"),
        ("gemma", {"tokens": []}, "<end_of_turn>"),
        ("qwen", {"tokens": []}, "<|im_end|>"),
        ("alpaca", {"tokens": []}, "</s>"),
        ("auto", {"tokens": [], "template": LLAMA2}, "</s>"),
        ("auto", {"tokens": ["<|eot|>"], "template": NO_END.replace("'\n'", "'<|eot|>\n'")}, "<|eot|>"),
        ("auto", {"tokens": []}, "</s>"),
        ("auto", {"tokens": [], "template": {"default": LLAMA2, "tool_use": NO_END}}, "</s>"),
    ],
)
def test_the_token_that_ends_a_turn_is_found(name: str, tokenizer: dict[str, Any], end: str) -> None:
    made = tokenizer_with(*tokenizer.pop("tokens"), **tokenizer)
    found = apply(made, name).turn_end
    assert (found.token, found.id) == (end, made.convert_tokens_to_ids(end))


def test_auto_keeps_the_models_own_template_and_else_takes_zephyr() -> None:
    own, none = tokenizer_with(template=LLAMA2), tokenizer_with()
    used = apply(own, "auto")
    assert (used.name, used.text) == ("auto (the model's own)", LLAMA2)
    assert own.chat_template == LLAMA2
    assert apply(none, "auto").name.startswith("zephyr")
    assert none.apply_chat_template(HELLO, tokenize=False) == "<s><|user|>\nhello</s>\n<|assistant|>\ngood day</s>\n"


KNOWN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\ngood day<|im_end|>\n"
    "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\n",
    "zephyr": "<s><|system|>\nS</s>\n<|user|>\nhello</s>\n<|assistant|>\ngood day</s>\n<|user|>\nand?</s>\n<|assistant|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\ngood day<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nand?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] S\n\nhello [/INST] good day</s>[INST] and? [/INST]",
    "gemma": "<s><start_of_turn>user\nS\n\nhello<end_of_turn>\n<start_of_turn>model\ngood day<end_of_turn>\n"
    "<start_of_turn>user\nand?<end_of_turn>\n<start_of_turn>model\n",
    "alpaca": "S\n\n### Instruction:\nhello\n\n### Response:\ngood day</s>\n\n### Instruction:\nand?\n\n### Response:\n",
}
KNOWN["qwen"] = KNOWN["chatml"]


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("name", NAMES)
def test_each_renders_as_it_is_known_for_asking_and_for_training(name: str, bos: str | None) -> None:
    tokenizer = tokenizer_with(bos=bos)
    used = apply(tokenizer, name)
    known = KNOWN[name] if bos else KNOWN[name].removeprefix("<s>")
    assert (rendered(tokenizer), rendered(tokenizer, used.text)) == (known, known)
    assert used.name == name


def test_alpaca_without_a_system_prompt_says_what_its_instructions_are() -> None:
    tokenizer = tokenizer_with()
    apply(tokenizer, "alpaca")
    assert tokenizer.apply_chat_template(HELLO, tokenize=False) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nhello\n\n### Response:\ngood day</s>\n\n"
    )


def test_a_system_prompt_that_no_question_follows_is_not_lost_to_mistral() -> None:
    tokenizer = tokenizer_with()
    apply(tokenizer, "mistral")
    messages = [{"role": "system", "content": "S"}, HELLO[1], HELLO[0]]
    assert (
        tokenizer.apply_chat_template(messages, tokenize=False)
        == "<s>[INST] S [/INST] good day</s>[INST] hello [/INST]"
    )


# ------------------------------------------------------------------------------------------------ what TRL ships


FAMILIES = sorted(p.stem for p in TRL_TEMPLATES.glob("*.jinja") if p.with_name(f"{p.stem}_training.jinja").exists())
PICTURES = ("idefics3", "llava_next", "smolvlm")  # their messages are lists of parts, which no row of ours has


def test_trl_still_ships_its_templates_by_these_names() -> None:
    assert len(FAMILIES) >= 30
    assert {"gemma3", "llama3", "qwen3", "qwen3_instruct_2507"} <= {*FAMILIES}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PICTURES])
def test_rows_of_a_known_template_are_rendered_with_trls_version_for_training(family: str) -> None:
    from trl.chat_template_utils import get_training_chat_template

    own = (TRL_TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    ends = ["<|user|>", "<|end|>", "<|return|>", "<|eot|>", "<turn|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>"]
    tokenizer = tokenizer_with(*CHATML, *LLAMA3, *GEMMA, *ends, template=own)
    used = apply(tokenizer, "auto")
    assert used.text == get_training_chat_template(tokenizer)
    assert tokenizer.chat_template == own
    assert used.name == "auto (the model's own, in TRL's version for training)"
    ask = {"conversation": HELLO[:1], "tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(**ask) == tokenizer.apply_chat_template(**ask, chat_template=used.text)


# ------------------------------------------------------------------------------------------------- tokens and BOS


@pytest.mark.parametrize("have", ["none", "some", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_the_tokenizer_lacks_are_added_as_one_each(name: str, have: str) -> None:
    tokens = NAMES[name]
    there = {"none": [], "some": tokens[-1:], "all": tokens}[have]
    tokenizer = tokenizer_with(*there)
    before = len(tokenizer)
    used = apply(tokenizer, name)
    assert used.added_tokens == tuple(token for token in tokens if token not in there)
    assert len(tokenizer) == before + len(used.added_tokens)
    for token in tokens:
        assert tokenizer(f"a{token}b", add_special_tokens=False)["input_ids"][1] == tokenizer.convert_tokens_to_ids(
            token
        )
        assert tokenizer.decode(tokenizer(f"a{token}b")["input_ids"], skip_special_tokens=True) == "ab"


def test_a_word_of_the_vocabulary_that_is_read_in_pieces_becomes_one_token_and_is_not_new() -> None:
    bpe = Tokenizer(models.WordLevel({"x": 0, "<|im_start|>": 1, "<|im_end|>": 2, "</s>": 3}, unk_token="x"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="x", eos_token="</s>")
    assert 2 not in tokenizer("<|im_end|>")["input_ids"]
    assert apply(tokenizer, "chatml").added_tokens == ()
    assert (tokenizer("<|im_end|>")["input_ids"], len(tokenizer)) == ([2], 4)


@pytest.mark.parametrize("name", ["auto", "file"])
def test_the_models_own_template_and_a_file_add_nothing(name: str, tmp_path: Path) -> None:
    chatml = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' + eos_token }}{% endfor %}"
    )
    tokenizer = tokenizer_with(template=chatml)
    before = len(tokenizer)
    used = apply(tokenizer, name, written(tmp_path / "my.jinja", chatml) if name == "file" else "")
    assert (used.added_tokens, len(tokenizer), used.text) == ((), before, chatml)


@pytest.mark.parametrize("puts_bos", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_one_bos_where_the_tokenizer_puts_one(name: str, puts_bos: bool) -> None:
    tokenizer = tokenizer_with(puts_bos=puts_bos)
    used = apply(tokenizer, name)
    writes = name in ("zephyr", "llama3", "mistral", "gemma")
    for text in (used.text, tokenizer.chat_template):
        ids = tokenizer(rendered(tokenizer, text), add_special_tokens=False)["input_ids"]
        assert ids.count(0) == (1 if puts_bos or writes else 0)
        assert (ids[0] == 0) == (puts_bos or writes)


@pytest.mark.parametrize("name", [*NAMES, "auto"])
def test_all_of_it_is_saved_with_the_tokenizer(name: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(puts_bos=True)
    used = apply(tokenizer, name)
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again.chat_template == tokenizer.chat_template
    assert (len(again), again.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)
    assert again.convert_tokens_to_ids(used.turn_end.token) == used.turn_end.id
    for text in (rendered(tokenizer), "hello! <|im_end|> good day"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        ids = again(text)["input_ids"]
        assert again.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)


# --------------------------------------------------------------------------------------------------------------- pad


@pytest.mark.parametrize("pad", [None, "</s>", "<|im_end|>", "<|im_start|>", "<|pad|>"])
@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
@pytest.mark.parametrize("name", ["chatml", "zephyr"])
def test_pad_ends_nothing(name: str, eos: str, pad: str | None) -> None:
    """Where it does, every batch teaches that nothing need end (huggingface/trl#734)."""
    tokenizer = tokenizer_with(*CHATML, "<|pad|>", eos=eos, pad=pad)
    before = len(tokenizer)
    end = apply(tokenizer, name).turn_end
    assert tokenizer.pad_token_id is not None
    assert tokenizer.pad_token_id not in (end.id, tokenizer.eos_token_id)
    if pad in ("<|pad|>", None):
        assert tokenizer.pad_token == "<|pad|>"
    assert len(tokenizer) == before  # a new token would have no embedding


@pytest.mark.parametrize("end", ["<|eot_id|>", "<|im_end|>", "<|end_of_text|>", "<end_of_turn>"])
def test_a_pad_token_that_ends_turns_in_another_template_is_not_kept(end: str) -> None:
    """A checkpoint's generation config may stop at it."""
    tokenizer = tokenizer_with(end, "<|pad|>", pad=end)
    apply(tokenizer, "zephyr")
    assert tokenizer.pad_token == "<|pad|>"


def test_pad_is_none_of_the_tokens_that_follow_the_words(tmp_path: Path) -> None:
    tokenizer = tokenizer_with("<A>", "<B>", "<|pad|>", pad="<B>")
    text = "{% for m in messages %}{{ m['content'] + '<A>\n<B>' }}{% endfor %}"
    assert apply(tokenizer, "file", written(tmp_path / "my.jinja", text)).turn_end.token == "<A>"
    assert tokenizer.pad_token == "<|pad|>"


def test_pad_ends_nothing_even_where_no_token_is_spare() -> None:
    tokenizer = tokenizer_with(pad="</s>")
    before = len(tokenizer)
    end = apply(tokenizer, "zephyr").turn_end
    assert tokenizer.pad_token_id != end.id
    assert len(tokenizer) == before


def test_pad_is_rather_a_special_token_that_no_row_has() -> None:
    tokenizer = tokenizer_with("<|user|>", "<unused>")
    apply(tokenizer, "zephyr")
    assert tokenizer.pad_token == "<unused>"


def test_pad_takes_no_common_character_from_a_vocabulary_with_one_special_token(tmp_path: Path) -> None:
    """GPT-2's. A pad token is special, so that decoding leaves it out: as its lowest id, all `!` would go."""
    tokenizer = tokenizer_with(bos="</s>", vocabulary=("</s>",))
    end = apply(tokenizer, "zephyr").turn_end
    assert tokenizer.pad_token_id not in (None, end.id)
    tokenizer.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in map(chr, range(33, 127)):
        assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == text


def test_a_spare_pad_token_of_the_model_is_kept() -> None:
    tokenizer = tokenizer_with("<spare>", "<|pad|>", pad="<spare>")
    apply(tokenizer, "zephyr")
    assert tokenizer.pad_token == "<spare>"


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["zephyr", "mistral", "alpaca"])
def test_turns_that_end_of_sequence_ends_need_it(name: str) -> None:
    with pytest.raises(PreflightError, match=f"chat_template={name} : the tokenizer has no end-of-sequence token"):
        apply(tokenizer_with(eos=None), name)


def test_a_template_that_ends_no_turn_is_refused() -> None:
    with pytest.raises(PreflightError, match=r"no special token ends an assistant turn, .* it writes '\\n'"):
        apply(tokenizer_with(template=NO_END), "auto")


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{{ messages[0]['contents'].x }}",
        "{{ 'a' + messages }}",
        "{% if %}",
        "{{ eos_token }}",
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused(template: str) -> None:
    with pytest.raises(PreflightError, match="chat_template=auto"):
        apply(tokenizer_with(template=template), "auto")


def test_several_templates_need_a_default() -> None:
    with pytest.raises(PreflightError, match=r"several templates and no default \(rag, tool_use\)"):
        apply(tokenizer_with(template={"tool_use": LLAMA2, "rag": LLAMA2}), "auto")


def test_a_tokenizer_without_character_offsets_is_refused() -> None:
    with pytest.raises(PreflightError, match="ByT5Tokenizer gives no character offsets"):
        apply(ByT5Tokenizer(), "chatml")


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(template=NO_END)
    used = apply(tokenizer, "file", written(tmp_path / "my.jinja", LLAMA2))
    assert (used.name, used.text, tokenizer.chat_template) == ("file (my.jinja)", LLAMA2, LLAMA2)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.jinja", None, "chat_template.path=.*none.jinja : cannot be read .No such file"),
        (".", None, "cannot be read .Is a directory"),
        ("latin.jinja", "größer".encode("latin-1"), "is no UTF-8 text"),
        (
            "loop.jinja",
            b"{{ eos_token }}\n{% for m in messages %}\n",
            r"chat_template=file \(loop.jinja\) : line 2 is no jinja",
        ),
        ("mark.jinja", b"{% generation %}{{ eos_token }}", "line 1 is no jinja"),
    ],
)
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PreflightError, match=reason):
        apply(tokenizer_with(), "file", str(tmp_path / name))
