"""What a row holds besides its words: thoughts, variables, the day, tools; and whether it is what the model is asked with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_lab.data.formats import Conversation, RowError, text_of, to_example
from sft_lab.data.template import Template, apply
from sft_lab.data.tokenize import IGNORE, Encoded, encode, prompt_and_reference
from sft_lab.errors import PreflightError
from sft_lab.evaluate import composes, exact_match, final_words
from tests.data.test_template import CHATML, TRL_TEMPLATES, tokenizer_with, written

CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# One that has a mode, writes the day, and leaves the system prompt out where it is told to.
MODES = (
    "{{ '<|im_start|>system\n' + strftime_now('%d %B %Y') + (' /no_think' if not enable_thinking | default(true) else '') "
    "+ '<|im_end|>\n' }}" + CHAT
)
NO_SYSTEM = CHAT.replace("{{ '<|im_start|>'", "{% if m['role'] != 'system' %}{{ '<|im_start|>'").replace(
    "'<|im_end|>\n' }}{% endfor", "'<|im_end|>\n' }}{% endif %}{% endfor"
)
# Thoughts in a place of their own, words searched for in what is unmarked.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.reasoning_content %}{{ '<reason>' "
    "+ m.reasoning_content + '</reason>' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT_ARGUMENTS = (  # as DeepSeek's: calls where the content is null, arguments joined to text
    "{% for m in messages %}{% if m['content'] is none %}{{ '<|im_start|>assistant\n' + m['tool_calls'][0]['function']['name'] "
    "+ '(' + m['tool_calls'][0]['function']['arguments'] + ')<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m['role'] + '\n' "
    "+ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As R1's, which asks for a thought.
OPENED = CHAT.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
QUICK = ("data.eval_rows=0", "evaluation.rows=0", "trainer.max_steps=1", "tracking=none")


def row(*contents: str, system: str | None = None, **thoughts: str) -> Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    messages[-1] |= thoughts
    return Conversation([{"role": "system", "content": system}, *messages] if system is not None else messages)


def made(text: str, **options: Any) -> tuple[Any, Template]:
    tokenizer = tokenizer_with(*CHATML, eos="<|im_end|>", template=text)
    return tokenizer, apply(tokenizer, "auto", **options)


def learned(tokenizer: Any, encoded: Encoded) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != IGNORE])


# --------------------------------------------------------------------------------------------------------- thoughts


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_beside_the_content_that_is_not_written_is_noted(key: str) -> None:
    tokenizer, template = made(CHAT)
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", key: "Two and two."}]
    encoded = encode(tokenizer, to_example({"messages": messages}), template, "assistant")  # type: ignore[arg-type]
    assert (learned(tokenizer, encoded), encoded.notes) == ("4<|im_end|>", ["thought_left_out"])


def test_a_thought_that_is_written_is_learned() -> None:
    tokenizer, template = made(THINKING)
    encoded = encode(tokenizer, row("2 + 2?", "4", reasoning_content="Two and two."), template, "assistant")
    assert (learned(tokenizer, encoded), encoded.notes) == ("<reason>Two and two.</reason>4<|im_end|>", ["thought"])


def test_tags_in_the_content_go_where_the_template_writes_thoughts() -> None:
    tokenizer, template = made(THINKING)
    tagged = row("2 + 2?", "<think>\nTwo and two.\n</think>\n\n4")
    beside = row("2 + 2?", "4", reasoning_content="Two and two.")
    assert encode(tokenizer, tagged, template, "assistant") == encode(tokenizer, beside, template, "assistant")
    inside = encode(tokenizer, row("2 + 2?", "I <think>so</think>: 4"), template, "assistant")
    assert "thought_in_words" in inside.notes


def test_words_are_not_looked_for_in_the_thought() -> None:
    """A short answer stands in it, too, and so may an end token."""
    tokenizer, template = made(THINKING)
    thought = "Maybe no, or no <|im_end|> again. Decide."
    encoded = encode(tokenizer, row("Which?", "no", reasoning_content=thought), template, "assistant")
    assert learned(tokenizer, encoded) == f"<reason>{thought}</reason>no<|im_end|>"
    assert encoded.notes == ["special_tokens_in_text", "thought"]


@pytest.mark.parametrize("content", ["<think>\n{}\n</think>\n\nno", "no"], ids=["in the content", "beside it"])
def test_words_are_not_looked_for_in_a_thought_that_the_prompt_opens(content: str) -> None:
    tokenizer, template = made(OPENED)
    thought = "no or <|im_end|> again. Decide."
    beside = {} if "{}" in content else {"reasoning_content": thought}
    encoded = encode(tokenizer, row("Which?", content.format(thought), **beside), template, "assistant")
    assert learned(tokenizer, encoded) == f"{thought}\n</think>\n\nno<|im_end|>"
    assert "thought_left_out" not in encoded.notes


def test_rows_do_not_depend_on_those_before_them() -> None:
    """A template that looks for a word in what is asked, and then asks otherwise."""
    text = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ ('[tool]' if 'search' in messages[loop.index0 - 1]['content'] else '') + m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n' + ('[tool]' if 'search' in messages[-1]['content'] else '') }}{% endif %}"
    )
    tokenizer, template = made(text)
    questions = ["hello", "search it now please my friend", "search it"]
    rows = [encode(tokenizer, row(question, "yes"), template, "assistant") for question in questions]
    assert [learned(tokenizer, encoded) for encoded in rows] == ["yes<|im_end|>"] * 3


def test_a_thought_that_ends_in_special_tokens_is_no_word_of_the_answer() -> None:
    own = (TRL_TEMPLATES / "gptoss.jinja").read_text(encoding="utf-8")
    tokens = ["<|start|>", "<|end|>", "<|return|>", "<|call|>", "<|channel|>", "<|message|>"]
    tokenizer = tokenizer_with(*tokens, eos="<|return|>", template=own)
    template = apply(tokenizer, "auto")
    for thought in ({}, {"reasoning_content": "Two and two."}):
        reference = prompt_and_reference(tokenizer, row("2 + 2?", "4", **thought), template)[1]
        assert final_words(reference) == "4"


def test_rows_that_differ_in_their_thoughts_are_no_duplicates() -> None:
    one, other = (row("12 x 12?", "144", reasoning_content=thought) for thought in ("by heart", "120 and 24"))
    assert text_of(one) != text_of(other)
    assert text_of(one, thoughts=False) == text_of(other, thoughts=False)  # either gives the other's answer away


# ---------------------------------------------------------------------------------------------------- words, and unknown


def test_a_system_prompt_that_is_left_out_refuses_the_row() -> None:
    """Also where the user's words have it in them."""
    tokenizer, template = made(NO_SYSTEM)
    for question in ("Name a fruit", "Be terse."):
        with pytest.raises(RowError, match=r"leaves out what message 1 \(system\) says"):
            encode(tokenizer, row(question, "Pear", system="Be terse."), template, "assistant")
    assert encode(tokenizer, row("Name a fruit", "Pear"), template, "assistant")


def test_words_in_another_order_or_spelling_are_there() -> None:
    swapped = CHAT.replace("{% for m in messages %}", "{% for m in (messages[1:2] + messages[:1] + messages[2:]) %}")
    spelled = CHAT.replace("m['content'] +", "(m['content'] | tojson if m['role'] == 'user' else m['content']) +")
    for text in (swapped, spelled):
        tokenizer, template = made(text)
        encoded = encode(tokenizer, row('say "hi"', "hi", system="Be terse."), template, "assistant")
        assert learned(tokenizer, encoded) == "hi<|im_end|>"


def test_the_unknown_token_is_noted_where_it_is_learned() -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "good": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens([AddedToken(t, special=True) for t in CHATML])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>", chat_template=CHAT
    )
    template = apply(tokenizer, "auto")
    assert "unknown_token" in encode(tokenizer, row("hello", "good 🙂"), template, "assistant").notes
    assert "unknown_token" not in encode(tokenizer, row("hello 🙂", "good"), template, "assistant").notes


# ------------------------------------------------------------------------------------------------ variables, the day


def test_variables_come_from_the_config_and_the_row_wins() -> None:
    tokenizer, template = made(MODES, variables={"enable_thinking": False}, day="2026-02-03")
    conversation = row("hello", "good day")
    assert "03 February 2026 /no_think" in tokenizer.decode(encode(tokenizer, conversation, template, "all").input_ids)
    conversation.template_kwargs = {"enable_thinking": True}
    assert "/no_think" not in tokenizer.decode(encode(tokenizer, conversation, template, "all").input_ids)
    prompt, _ = prompt_and_reference(tokenizer, conversation, template)
    assert "/no_think" not in tokenizer.decode(prompt)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("enable_thinkin", "does not read it (allowed: enable_thinking; did you mean 'enable_thinking'?)"),
        ("tools", "by sft_lab itself"),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_refused(name: str, told: str) -> None:
    with pytest.raises(PreflightError, match=f"chat_template.kwargs.{name} : ") as error:
        made(MODES, variables={name: True})
    assert told in str(error.value)


def test_the_day_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + datetime.timedelta(days=1)

    tokenizer, template = made(MODES)
    today = datetime.date.today()
    before = encode(tokenizer, row("hello", "good day"), template, "assistant")
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    again = Template.of(json.loads(json.dumps(dataclasses.asdict(template))))
    assert encode(tokenizer, row("hello", "good day"), again, "assistant") == before
    assert template.date == today.isoformat()
    assert today.strftime("%d %B %Y") in tokenizer.decode(before.input_ids)
    with pytest.raises(PreflightError, match="is no date"):
        made(MODES, day="tomorrow")


@pytest.mark.e2e
def test_a_run_keeps_its_day_and_variables(main: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": row("hello", "good day").messages}), encoding="utf-8")
    words = (
        "model=tiny_llama", "data=from_file", "data.path=rows.jsonl", "data.eval_path=rows.jsonl", "preflight.allow=[leak]",
        "chat_template=from_file", f"chat_template.path={written(tmp_path / 'my.jinja', MODES)}",
        "chat_template.kwargs.enable_thinking=false", *QUICK[1:],
    )  # fmt: skip
    assert main(*words, "chat_template.date=2026-02-03", "hydra.run.dir=run").returncode == 0
    asked = json.loads(main("inspect", "run", "--json").stdout)["rows"][0]
    assert "03 February 2026 /no_think" in "".join(token["text"] for token in asked["tokens"])
    assert main(*words, "hydra.run.dir=today").returncode == 0
    import datetime

    import yaml

    kept = yaml.safe_load((tmp_path / "today" / "config.yaml").read_text())["chat_template"]
    assert (kept["date"], kept["kwargs"]) == (datetime.date.today().isoformat(), {"enable_thinking": False})
    repeated = main("repro", "run")
    assert (repeated.returncode, "byte-equal" in repeated.stdout) == (0, True), repeated.stdout + repeated.stderr


# ------------------------------------------------------------------------------------------------------------ tools


def test_arguments_and_contents_have_the_form_that_the_template_takes() -> None:
    tokenizer, template = made(TEXT_ARGUMENTS)
    conversation = row("1?", "")
    conversation.messages[-1]["tool_calls"] = [CALL]
    encoded = encode(tokenizer, conversation, template, "assistant")
    assert learned(tokenizer, encoded) == 'add({"a": 1})<|im_end|>'
    assert prompt_and_reference(tokenizer, conversation, template)[1] == 'add({"a": 1})'


def test_a_template_named_tool_use_is_taken_for_conversations_with_tools() -> None:
    qwen = (TRL_TEMPLATES / "qwen3_instruct_2507.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(*CHATML, eos="<|im_end|>", template={"default": CHAT, "tool_use": qwen})
    template = apply(tokenizer, "auto")
    conversation = row("1?", "")
    conversation.messages[-1]["tool_calls"] = [CALL]
    conversation.tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    encoded = encode(tokenizer, conversation, template, "assistant")
    assert learned(tokenizer, encoded) == '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert "# Tools" in tokenizer.decode(prompt_and_reference(tokenizer, conversation, template)[0])
    assert tokenizer.decode(encode(tokenizer, row("hi", "ho"), template, "all").input_ids).startswith(
        "<|im_start|>user\nhi"
    )


def test_whatever_a_template_raises_is_told_of_the_row() -> None:
    tokenizer, template = made(CHAT + "{% if messages | length > 2 %}{{ 'x'.index('?') }}{% endif %}")
    with pytest.raises(RowError, match=r"refuses this conversation \(ValueError: substring not found\)"):
        encode(tokenizer, row("a", "b", "c", "d"), template, "assistant")


# ------------------------------------------------------------------------------------------ the prompt, and the answer


@pytest.mark.parametrize(("how", "rows"), [("warn", 1), ("split", 2)])
def test_turns_that_are_asked_with_other_words_can_train_apart(
    main: Callable[..., Any], tmp_path: Path, how: str, rows: int
) -> None:
    """By Qwen3's own template, whose version for training writes an empty thought into each turn."""
    from tests.test_base_weights import made as model_of

    folder = model_of(tmp_path / "base")
    own = (TRL_TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(own, encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"messages": row("a", "first", "b", "second").messages}), encoding="utf-8"
    )
    words = ("model=from_path", f"model.path={folder}", "data=from_file", "data.path=rows.jsonl", *QUICK)
    report = json.loads(main("plan", *words, f"data.on_context_mismatch={how}", "--json").stdout)
    found = {finding["name"]: finding["message"] for finding in report["findings"]}
    assert ("context_differs" in found) == (how == "warn")
    assert report["rows"]["kept"] == rows
    if how == "warn":
        assert found["context_differs"].startswith("1 of 1 rows have other words before a learned turn")
    else:
        assert found["split_by_turn"].startswith("1 rows that are not what the model is asked with")
    refused = main("plan", *words, "data.on_context_mismatch=error")
    assert (refused.returncode, "row 1: what stands before a learned turn" in refused.stderr) == (2, True)


def test_a_data_set_that_loses_every_thought_is_an_error(main: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"messages": row(f"{i}?", "4", reasoning_content="Hm.").messages} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = main("plan", "model=tiny_llama", "data=from_file", "data.path=rows.jsonl", *QUICK)
    assert (
        result.returncode,
        "leaves out every thought of the data" in " ".join((result.stdout + result.stderr).split()),
    ) == (2, True)


def test_the_final_words_of_an_answer_are_behind_its_thought() -> None:
    assert final_words("<think>\n\n</think>\n\nPear ") == "Pear"
    assert final_words("Two and two.</think>4") == "4"  # opened by the prompt
    assert final_words("<think>never closed") == ""
    assert exact_match("<think>\nhm\n</think>\n\n42", "42") == 1
    assert exact_match("<think>\nhm\n</think>\n\n42", "<think>\n\n</think>\n\n42") == 1
    assert exact_match("<think>\n42\n</think>\n\n43", "42") == 0
    assert composes("<think>\n\n</think>\n\npython -m sft_lab model=tiny_llama") == 1


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "opened", "chatml"])
def test_a_model_that_has_learned_its_row_matches_it(main: Callable[..., Any], tmp_path: Path, family: str) -> None:
    """Whatever the template adds before the words, or opens in the prompt."""
    answer = "<think>\nOf trees.\n</think>\n\nPear" if family == "opened" else "Pear"
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": row("Name a fruit", answer).messages}))
    template = ["chat_template=chatml"]
    if family != "chatml":
        from tests.test_base_weights import made as model_of

        folder = model_of(tmp_path / "base", hidden_size=64)
        own = OPENED if family == "opened" else (TRL_TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
        (folder / "chat_template.jinja").write_text(own, encoding="utf-8")
        template = ["model=from_path", f"model.path={folder}"]
    result = main(
        *(["model=tiny_llama"] if family == "chatml" else []), *template, "peft=none", "trainer.learning_rate=0.006",
        "trainer.warmup_steps=0", "trainer.lr_scheduler_type=constant", "data=from_file", "data.path=one.jsonl",
        "data.eval_path=one.jsonl", "preflight.allow=[leak]", "data.metrics=[exact_match]", "trainer.max_steps=80",
        "tracking=none", "hydra.run.dir=run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]["exact_match"] == 1.0
