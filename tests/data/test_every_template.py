"""What every chat template that TRL ships trains, compared with the prompts of `apply_chat_template` and with the ends by hand."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_lab.data.formats import Conversation, Message, RowError
from sft_lab.data.template import Template, apply
from sft_lab.data.tokenize import IGNORE, Encoded, by_turn, encode
from tests.data.test_template import TRL_TEMPLATES, tokenizer_with

FAMILIES = sorted(file.stem for file in TRL_TEMPLATES.glob("*.jinja") if not file.stem.endswith("_training"))
# By the beginning of a family's name: the tokenizer's end of sequence, the token that ends an answer, and the one that ends a call.
ENDS = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", ""),
    "deepseek": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "diffusion_gemma": ("<turn|>", "<turn|>", "<tool_call|>"),
    "gemma4_v2": ("<turn|>", "<turn|>", "<turn|>"),
    "gemma4": ("<turn|>", "<turn|>", "<|tool_response>"),
    "gemma": ("<eos>", "<end_of_turn>", ""),
    "glm4moe": ("<|endoftext|>", "<|user|>", "<|observation|>"),
    "gptoss": ("<|return|>", "<|return|>", "<|call|>"),
    "idefics3": ("<end_of_utterance>", "<end_of_utterance>", ""),
    "smolvlm": ("<end_of_utterance>", "<end_of_utterance>", ""),
    "lfm2": ("<|im_end|>", "<|im_end|>", "<|im_end|>"),
    "llama3": ("<|eot_id|>", "<|eot_id|>", "<|eot_id|>"),
    "llava_next": ("</s>", "</s>", ""),
    "muse_glimmer": ("<|eot|>", "<|eot|>", "<|eot|>"),
    "nemotron": ("<|im_end|>", "<|im_end|>", "<|im_end|>"),
    "phi3": ("<|endoftext|>", "<|end|>", ""),
    "qwen": ("<|im_end|>", "<|im_end|>", "<|im_end|>"),
}
EARLIER = {"gptoss": "<|end|>"}  # what ends an answer that a message follows, where that is another token
PICTURES = ("idefics3", "llava_next", "smolvlm")  # their templates take a list of parts as content
# They have a place of their own for thoughts, to which one in the content is moved; and one that has none for them beside it.
PLACED = (
    "diffusion_gemma",
    "gemma4_v5",
    "gptoss",
    "lfm2_2_5",
    "lfm2_2_5_v2",
    "lfm2_2_5_vl",
    "muse_glimmer",
    "nemotron_3_nano",
    "qwen3_8",
)
TAGGED = ("deepseek_r1_distill",)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "which"}}},
    },
}
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "get_weather", "arguments": {"town": "Bern"}}}


def user(words: str) -> Message:
    return {"role": "user", "content": words}


def assistant(words: str, **more: Any) -> Message:
    return {"role": "assistant", "content": words, **more}


CASES = {
    "system": Conversation([{"role": "system", "content": "Be brief."}, user("Q1"), assistant("A1")]),
    "turns": Conversation([user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]),
    "tags": Conversation(
        [
            user("Q1"),
            assistant("<think>\nT1\n</think>\n\nA1"),
            user("Q2"),
            assistant("<think>\nT2\n</think>\n\nA2"),
        ]
    ),
    "reasoning": Conversation(
        [user("Q1"), assistant("A1", reasoning_content="T1"), user("Q2"), assistant("A2", reasoning_content="T2")]
    ),
    "tools": Conversation(
        [
            user("Q1"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "name": "get_weather", "tool_call_id": "abcdef123", "content": "7 degrees"},
            assistant("A2"),
            user("Q3"),
            assistant("A3"),
        ],
        [TOOL],
    ),
}
ASKED = "renders what comes before an assistant turn differently"
NO_TOOLS = "writes no tool|refuses this conversation"
# What is refused, and why.
REFUSED = {
    **{(family, "tools"): NO_TOOLS for family in ("cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3",
       "idefics3", "smolvlm", "lfm2", "llama3", "llava_next", "phi3", "phi3_5", "qwen2_5_vl")},
    ("gemma", "system"): "System role not supported",
    # They ask for a thought, and write the answers of these rows without.
    **{(family, case): ASKED for family in FAMILIES if family.startswith("nemotron") for case in ("system", "turns", "tags", "reasoning", "tools")},
    **{("deepseek_r1_distill", case): ASKED for case in ("system", "turns")},
    **{("deepseekv3", case): ASKED for case in ("system", "turns", "tags", "reasoning")},
    # They ask with an empty thought, and these rows have thoughts.
    **{("qwen3_5_nothink", case): ASKED for case in ("tags", "reasoning")},
}  # fmt: skip
# Whose prompt is not what the row has before a later turn: they leave earlier thoughts out, also empty ones.
DIFFERS = {
    *((family, case) for family in ("qwen3", "qwen3_5_think", "qwen3_6") for case in ("turns", "tags", "reasoning", "tools")),
    *(("qwen3_5_nothink", case) for case in ("turns", "tools")),
    *(("deepseek_r1_distill", case) for case in ("tags", "reasoning")),
}  # fmt: skip


def ends_of(family: str) -> tuple[str, str, str]:
    return next(ends for name, ends in ENDS.items() if family.startswith(name))


@functools.cache
def made(family: str) -> tuple[PreTrainedTokenizerFast, Template]:
    own = (TRL_TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    eos = ends_of(family)[0]
    tokens = sorted({*re.findall(r"<[|｜]?[\w▁]+[|｜]?>", own), *ends_of(family)} - {"", "<s>", "</s>", "<think>"})
    tokenizer = tokenizer_with(*tokens, eos=eos, template=own)
    return tokenizer, apply(tokenizer, "auto")


def learned_spans(tokenizer: Any, row: Encoded) -> tuple[str, list[tuple[int, int]]]:
    """The row's text, and the ranges of its characters that carry loss, by the offsets of its tokens."""
    text = tokenizer.decode(row.input_ids)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert offsets["input_ids"] == row.input_ids
    spans: list[tuple[int, int]] = []
    before = IGNORE
    for label, (start, stop) in zip(row.labels, offsets["offset_mapping"], strict=True):
        if label != IGNORE:
            spans = [*spans[:-1], (spans[-1][0], stop)] if before != IGNORE else [*spans, (start, stop)]
        before = label
    return text, spans


def prompts(family: str, tokenizer: Any, case: str) -> list[str]:
    """What the model is asked with for each assistant turn, by Transformers itself."""
    if (family in PLACED and case == "tags") or (family in TAGGED and case == "reasoning"):
        case = "reasoning" if case == "tags" else "tags"
    messages: list[Message] = CASES[case].messages
    if family in PICTURES:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return [
        tokenizer.apply_chat_template(
            messages[:i], tools=CASES[case].tools or None, tokenize=False, add_generation_prompt=True
        )
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_turn_follows_the_prompt_and_stops_at_its_end(family: str, case: str) -> None:
    conversation = CASES[case]
    tokenizer, template = made(family)
    if reason := REFUSED.get((family, case)):
        with pytest.raises(RowError, match=reason):
            encode(tokenizer, conversation, template, "assistant")
        return
    row = encode(tokenizer, conversation, template, "assistant")
    text, spans = learned_spans(tokenizer, row)
    turns = [message for message in conversation.messages if message["role"] == "assistant"]
    assert len(spans) == len(turns)
    _, answer_end, call_end = ends_of(family)
    for i, ((start, stop), message, prompt) in enumerate(
        zip(spans, turns, prompts(family, tokenizer, case), strict=True)
    ):
        if (family, case) not in DIFFERS:
            assert text[:start] == prompt
        end = call_end if "tool_calls" in message else answer_end
        if message is not turns[-1] and "tool_calls" not in message:
            end = EARLIER.get(family, end)
        said = text[start:stop]
        assert said.endswith(end)
        words = message["content"].rpartition("</think>")[2].strip()
        assert "tool_calls" in message or said.rpartition(words)[2] in (end, f"<|END_RESPONSE|>{end}")
        assert not any(other in said for other in ("Q1", "Q2", "Q3", "7 degrees"))
        assert "get_weather" in said or "tool_calls" not in message
        thought = f"T{i + 1}" in said
        assert thought or case not in ("tags", "reasoning") or "thought_left_out" in row.notes
    assert ("context_differs" in row.notes) == ((family, case) in DIFFERS)


@pytest.mark.parametrize("case", ["turns", "tags", "reasoning", "tools"])
@pytest.mark.parametrize("family", sorted({family for family, _ in DIFFERS} | {"gptoss", "nemotron_3_nano"}))
def test_apart_each_turn_has_its_own_prompt_and_the_end_that_it_has_as_the_last(family: str, case: str) -> None:
    conversation = CASES[case]
    tokenizer, template = made(family)
    if (family, case) in REFUSED and not (family == "nemotron_3_nano" and case in ("tags", "reasoning")):
        with pytest.raises(RowError):
            by_turn(tokenizer, conversation, template, "assistant")
        return
    rows = by_turn(tokenizer, conversation, template, "assistant")
    turns = [message for message in conversation.messages if message["role"] == "assistant"]
    assert len(rows) == len(turns)
    for row, message, prompt in zip(rows, turns, prompts(family, tokenizer, case), strict=True):
        text, ((start, stop),) = learned_spans(tokenizer, row)
        assert text[:start] == prompt
        assert text[:stop].endswith(ends_of(family)[2 if "tool_calls" in message else 1])
        assert not {"context_differs", "other_turn_end"} & set(row.notes)
