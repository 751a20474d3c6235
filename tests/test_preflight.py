"""What the preflight finds on data that has it, by name, level and row; and its numbers against counted ones."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import is_flash_attn_2_available

from sft_lab import preflight
from sft_lab import trainer as trainers
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.errors import ConfigError, PreflightError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config
from tests.data.preparing import config_of, written
from tests.data.test_template import tokenizer_with

GOOD: list[Any] = [
    {"prompt": f"what is {i}?", "completion": f"a number such as {i} " + "and more " * i} for i in range(12)
]


def examined(tmp_path: Path, rows: list[Any], *overrides: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """preflight.json of rows.jsonl, and its findings by name."""
    config = config_of(f"data.path={written(tmp_path / 'rows.jsonl', rows)}", *overrides)
    report = preflight.examine(config, prepare(config), RunDirectory(tmp_path / "run")).as_dict()
    return report, {finding["name"]: finding for finding in report["findings"]}


def levels(findings: dict[str, dict[str, Any]], *names: str) -> list[str]:
    return [findings[name]["level"] for name in names]


def test_good_data_has_nothing_but_facts(tmp_path: Path) -> None:
    report, findings = examined(tmp_path, GOOD)
    assert report["ok"]
    assert {finding["level"] for finding in findings.values()} == {"fact"}


ODD: dict[str, tuple[Any, str]] = {
    "special_tokens_in_text": ({"prompt": "what is <|im_end|>?", "completion": "an end"}, "warning"),
    "same_role_twice": (
        {"messages": [{"role": r, "content": r} for r in ("user", "user", "assistant")]}, "warning",
    ),
    "assistant_first": ({"messages": [{"role": r, "content": r} for r in ("assistant", "user", "assistant")]}, "warning"),
    "ends_with_user": ({"messages": [{"role": r, "content": r} for r in ("user", "assistant", "user")]}, "fact"),
    "empty_question": ({"prompt": " ", "completion": "an answer to nothing"}, "warning"),
    "empty_answer": ({"prompt": "say nothing", "completion": ""}, "warning"),
    "untrained_turn_end": ({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, "error"),
    "text": ({"text": "all of this is learned"}, "fact"),
    "duplicates_exact": ({"prompt": "What is  3?", "completion": GOOD[3]["completion"]}, "warning"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_a_peculiar_row_is_found_by_name_and_id(tmp_path: Path, name: str) -> None:
    row, level = ODD[name]
    _, findings = examined(tmp_path, [*GOOD, row])
    assert findings[name]["level"] == level
    assert [shown.split(" ")[0] for shown in findings[name]["rows"]] == [f"{tmp_path}/rows.jsonl:13"]


def test_two_ends_or_two_beginnings_of_a_turn_stop_the_run(tmp_path: Path) -> None:
    template = tmp_path / "twice.jinja"
    template.write_text(
        "{{ bos_token + bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|><|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    _, findings = examined(tmp_path, GOOD, "chat_template.name=file", f"chat_template.path={template}")
    assert levels(findings, "double_bos", "extra_eos") == ["error", "error"]


def test_near_duplicates_are_found_and_left_out(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(80)]
    twin = (
        {"prompt": "say this", "completion": " ".join(words)},
        {"prompt": "say this", "completion": " ".join([*words[:-1], "x"])},
    )
    _, findings = examined(tmp_path, [*GOOD, *twin])
    assert findings["duplicates_near"]["rows"] == [f"{tmp_path}/rows.jsonl:14 repeats {tmp_path}/rows.jsonl:13"]
    report, findings = examined(tmp_path, [*GOOD, *twin], "data.deduplicate=near")
    assert report["rows"] == {"read": 14, "kept": 13, "dropped": {"duplicate": 1}}
    assert findings["dropped_duplicate"]["rows"] == [f"{tmp_path}/rows.jsonl:14"]


def test_answers_that_come_again_and_again_are_counted(tmp_path: Path) -> None:
    _, findings = examined(tmp_path, [{"prompt": f"is {i} odd?", "completion": "yes"} for i in range(10)])
    assert findings["answers"]["message"] == "10 different rows have 1 different answers"


def leaky(tmp_path: Path) -> str:
    return f"data.eval_path={written(tmp_path / 'eval.jsonl', [GOOD[2], {'prompt': 'new', 'completion': 'row'}])}"


@pytest.mark.parametrize(
    ("override", "key"),
    [("data.eval_fraction=0.01", "data.eval_fraction"), ("data.eval_path=EVAL", "data.eval_path")],
)
def test_held_out_rows_that_were_asked_for_and_are_none(tmp_path: Path, override: str, key: str) -> None:
    """A hundredth of twelve rows, and a file whose only row is left out."""
    path = written(tmp_path / "eval.jsonl", [{"prompt": "long", "completion": "word " * 2000}])
    report, findings = examined(tmp_path, GOOD, override.replace("EVAL", str(path)))
    assert (report["ok"], report["eval_rows"]) == (False, 0)
    assert findings[key]["level"] == "error"
    assert "no row is held out" in findings[key]["message"]


def test_a_source_that_gives_nothing_is_named(tmp_path: Path) -> None:
    path = str(written(tmp_path / "rows.jsonl", GOOD))
    shares = {"all": {}, "few": {"sample": 0.01}, "none": {"max_rows": 0}}
    config = config_of(data="mixture", sources={name: {"path": path, **share} for name, share in shares.items()})
    report = preflight.examine(config, prepare(config), RunDirectory(tmp_path / "run")).as_dict()
    found = {f["name"]: f["message"] for f in report["findings"] if f["name"].startswith("data.sources.")}
    assert found == {
        "data.sources.few": "no row of it trains (sample=0.01)",
        "data.sources.none": "no row of it trains (max_rows=0)",
    }
    assert report["ok"]


def test_a_leak_stops_the_run(tmp_path: Path) -> None:
    report, findings = examined(tmp_path, GOOD, leaky(tmp_path))
    assert not report["ok"]
    assert findings["leak"]["level"] == "error"
    assert findings["leak"]["rows"] == [f"{tmp_path}/rows.jsonl:3 gives away {tmp_path}/eval.jsonl:1 (exact)"]
    config = config_of(f"data.path={tmp_path}/rows.jsonl", leaky(tmp_path))
    with pytest.raises(PreflightError, match=r"leak : 1 of 2 held-out rows .*preflight\.allow=\[leak\]"):
        preflight.check(config, prepare(config), RunDirectory(tmp_path / "run"))


def test_rows_that_leak_are_dropped_if_told_to(tmp_path: Path) -> None:
    report, findings = examined(tmp_path, GOOD, leaky(tmp_path), "data.on_leak=drop")
    assert report["ok"]
    assert report["rows"]["dropped"] == {"leak": 1}
    assert levels(findings, "leak", "dropped_leak") == ["warning", "warning"]


def test_an_allowed_error_is_a_warning_on_record(tmp_path: Path) -> None:
    report, findings = examined(tmp_path, GOOD, leaky(tmp_path), "preflight.allow=[leak, leek]")
    assert report["ok"]
    assert findings["leak"]["message"].endswith("(allowed by preflight.allow)")
    assert report["config"]["preflight"]["allow"] == ["leak", "leek"]
    assert findings["preflight.allow"]["message"] == "leek is no finding of this run"


def test_new_tokens_are_told_of(tmp_path: Path) -> None:
    report, findings = examined(tmp_path, GOOD, "chat_template.name=llama3")
    assert "<|eot_id|>" in findings["added_tokens"]["message"]
    plain, _ = examined(tmp_path, GOOD)
    width = 64  # of tiny_llama, whose output embedding is its own: each new token trains a row of both
    assert report["parameters"]["trainable"] - plain["parameters"]["trainable"] in (3 * width, 6 * width)


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    report, findings = examined(tmp_path, GOOD)
    assert not report["ok"]
    assert findings["disk_full"]["level"] == "error"


def test_long_rows_are_told_of_however_they_are_treated(tmp_path: Path) -> None:
    turns = [{"role": role, "content": "word " * 12} for _ in range(4) for role in ("user", "assistant")]
    rows = [*GOOD[:3], {"messages": turns}]
    for how, name in (("drop", "dropped_long"), ("truncate", "truncated"), ("split", "split")):
        report, findings = examined(tmp_path, rows, "trainer.max_length=200", f"data.on_long_row={how}")
        assert findings[name]["rows"] == [f"{tmp_path}/rows.jsonl:4"], how
        assert (how == "drop") == (report["rows"]["dropped"] == {"long": 1})


# -------------------------------------------------------------------------------------------- single rows, and all


EXTRA_END = {"prompt": "a", "completion": "b<|im_end|>"}
TWO_BEGINNINGS = {"input_ids": [1, 1, 7, 2]}  # <|im_start|> twice
LONG = {"prompt": "short", "completion": "word " * 100}


def made(tmp_path: Path, rows: list[Any], *overrides: str) -> tuple[Config, RunDirectory, Prepared]:
    """In the order in which a trainer is built of them."""
    config = config_of(f"data.path={written(tmp_path / 'rows.jsonl', rows)}", *overrides)
    return config, RunDirectory(tmp_path / "run"), prepare(config)


def named(tmp_path: Path, *numbers: int) -> list[str]:
    return [f"{tmp_path}/rows.jsonl:{number}" for number in numbers]


@pytest.mark.parametrize(("name", "row"), [("extra_eos", EXTRA_END), ("double_bos", TWO_BEGINNINGS)])
def test_a_single_row_stops_the_run_and_is_named(tmp_path: Path, name: str, row: Any) -> None:
    report, findings = examined(tmp_path, [*GOOD[:2], row, GOOD[2]])
    assert not report["ok"]
    assert (findings[name]["level"], findings[name]["rows"]) == ("error", named(tmp_path, 3))


def test_of_a_peculiarity_that_many_rows_have_some_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    _, findings = examined(tmp_path, [{"text": f"hello {i}"} for i in range(150)])
    assert findings["text"]["message"].startswith("150 of 150 rows")
    assert findings["text"]["rows"] == named(tmp_path, *range(1, 101))


def test_all_rows_that_were_left_out_or_cut_are_listed(tmp_path: Path) -> None:
    rows = [*GOOD, *({"prompt": f"{i}", "completion": f"{i} word " * 50} for i in range(150))]
    for how, name in (("drop", "dropped_long"), ("truncate", "truncated")):
        _, findings = examined(tmp_path, rows, "trainer.max_length=128", f"data.on_long_row={how}")
        assert findings[name]["rows"] == named(tmp_path, *range(13, 163))


def test_bad_rows_stand_with_their_reason_and_rows_of_weight_0_without(tmp_path: Path) -> None:
    rows = [GOOD[0], {"prompt": "a"}, {**GOOD[1], "weight": 0}, 7]
    report, findings = examined(tmp_path, rows, "data.on_bad_row=skip")
    assert levels(findings, "dropped_bad", "dropped_weight_0") == ["warning", "warning"]
    assert [row[: row.index(": ")] for row in findings["dropped_bad"]["rows"]] == named(tmp_path, 2, 4)
    assert "columns prompt fit no format" in findings["dropped_bad"]["rows"][0]
    assert findings["dropped_weight_0"]["rows"] == named(tmp_path, 3)
    assert report["rows"] == {"read": 4, "kept": 1, "dropped": {"bad": 2, "weight_0": 1}}


def test_held_out_rows_that_are_left_out_are_told_apart(tmp_path: Path) -> None:
    held_out = written(tmp_path / "eval.jsonl", [{"prompt": "new", "completion": "row"}, LONG, {"x": 1}])
    overrides = [f"data.eval_path={held_out}", "data.on_bad_row=skip", "trainer.max_length=128"]
    report, findings = examined(tmp_path, GOOD, *overrides)
    assert findings["dropped_eval_long"]["rows"] == [f"{held_out}:2"]
    assert findings["dropped_eval_bad"]["rows"][0].startswith(f"{held_out}:3: columns x fit no")
    assert (report["rows"]["dropped"], report["eval_rows"]) == ({}, 1)


def test_a_part_that_nothing_could_be_made_of_is_told(tmp_path: Path) -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "word " * 100)]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    _, findings = examined(tmp_path, [GOOD[0], row], "trainer.max_length=128", "data.on_long_row=split")
    assert levels(findings, "split", "split_in_part") == ["warning", "warning"]
    assert findings["split_in_part"]["rows"] == named(tmp_path, 2)


def test_a_row_without_loss_never_gets_this_far_and_would_stop_the_run(tmp_path: Path) -> None:
    """Such a row is a bad one already; this holds where tokens came about another way."""
    config, run, data = made(tmp_path, GOOD[:3])
    rows = [dict(row) for row in data.train]
    rows[1] |= {"labels": [IGNORE] * rows[1]["length"], "supervised": 0}
    data.train = Dataset.from_list(rows, features=data.train.features)
    with pytest.raises(PreflightError, match=r"no_supervised_token : 1 rows carry no loss: .*rows\.jsonl:2 "):
        preflight.check(config, data, run)


def test_what_is_found_is_of_rows_that_train_alone(tmp_path: Path) -> None:
    """Rows that repeat others lie among the tokens, too: row 3, with one more end than row 1, and row 5."""
    loud, quiet = ({"prompt": f"what is {word}?", "completion": "a token"} for word in ("<|IM_END|>", "<|im_end|>"))
    rows = [loud, GOOD[0], quiet, GOOD[1], GOOD[0], {"text": "all of this is learned"}]
    report, findings = examined(tmp_path, rows, "data.deduplicate=exact")
    assert findings["text"]["rows"] == named(tmp_path, 6)
    assert report["special_tokens"]["turn_end"][1:] == (1, 2)
    assert findings["duplicates_exact"]["message"].endswith("(left out)")
    _, _, data = made(tmp_path, rows, "data.deduplicate=exact")
    assert [row["number"] for row in data.train] == [1, 2, 4, 6]
    assert report["tokens"]["total"] == sum(len(row["input_ids"]) for row in data.train)
    _, findings = examined(tmp_path, rows)
    assert "kept" in findings["duplicates_exact"]["message"]


def test_rows_that_repeat_each_other_are_no_different_rows_of_one_answer(tmp_path: Path) -> None:
    _, findings = examined(tmp_path, [GOOD[0]] * 3)
    assert "answers" not in findings


# ------------------------------------------------------------------------------------------------ mixture and stream


def mixed(tmp_path: Path, rows: tuple[int, int], a: dict[str, Any], b: dict[str, Any], *overrides: str) -> Config:
    """`a` is of plain texts, which end once; `b` of questions and answers, in which two turns end."""
    texts = [{"text": f"text {i}"} for i in range(rows[0])]
    talks = [{"prompt": f"question {i}?", "completion": f"answer {i}"} for i in range(rows[1])]
    sources = {
        "a": {"path": str(written(tmp_path / "a.jsonl", texts)), **a},
        "b": {"path": str(written(tmp_path / "b.jsonl", talks)), **b},
    }
    return config_of(*overrides, data="mixture", sources=sources)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ({}, {}, "a 8 (66.7%), b 4 (33.3%)"),
        ({"sample": 0.5}, {"max_rows": 1}, "a 4 (80.0%), b 1 (20.0%)"),
    ],
)
def test_a_mixture_is_told_with_its_shares(tmp_path: Path, a: Any, b: Any, message: str) -> None:
    config = mixed(tmp_path, (8, 4), a, b)
    report = preflight.examine(config, prepare(config), RunDirectory(tmp_path / "run")).as_dict()
    assert [found["message"] for found in report["findings"] if found["name"] == "mixture"] == [message]


@pytest.mark.parametrize(("rows", "weight"), [((30, 3), 0.001), ((3, 3), 0.3)], ids=["consecutive", "of both"])
def test_of_a_mixture_only_rows_that_were_drawn_are_counted(
    tmp_path: Path, rows: tuple[int, int], weight: float
) -> None:
    """Of 30 texts at a thousandth of the weight none comes up before the three others are used up."""
    config = mixed(tmp_path, rows, {"weight": weight}, {}, "data.mix=interleave_first_exhausted")
    data = prepare(config)
    assert len(data.train) < sum(rows)
    report = preflight.examine(config, data, RunDirectory(tmp_path / "run")).as_dict()
    lengths = sorted(len(row["input_ids"]) for row in data.train)
    assert report["tokens"]["total"] == sum(lengths)
    assert (report["tokens"]["lengths"]["p0"], report["tokens"]["lengths"]["p100"]) == (lengths[0], lengths[-1])
    ends = [row["input_ids"].count(data.turn_end_id) for row in data.train]
    assert report["special_tokens"]["turn_end"][1:] == (min(ends), max(ends))
    texts = [data.row_id(row) for row in data.train if row["notes"] == "text"]
    assert [found["rows"] for found in report["findings"] if found["name"] == "text"] == ([texts] if texts else [])


def test_of_a_stream_it_says_how_much_was_looked_at(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{i} it is"} for i in range(1200)]
    report, findings = examined(tmp_path, rows, "data.streaming=true", "trainer.max_steps=7")
    assert findings["streaming"]["level"] == "warning"
    assert "only the first 1000 rows" in findings["streaming"]["message"]
    assert (report["rows"]["read"], report["steps"]) == (1000, 7)


# ----------------------------------------------------------------------------------------------- model and template


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> str:
    """model.path of a Llama of one layer with this tokenizer."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"model.path={folder}"


@pytest.mark.skipif(is_flash_attn_2_available(kernels_fallback_ok=True), reason="there is flash attention here")
def test_an_attention_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=flash_attention_2 : needs .*sdpa"):
        examined(tmp_path, GOOD, "model.attn_implementation=flash_attention_2")


def test_rows_without_the_tokenizers_own_bos_are_a_warning(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    model = saved(tmp_path / "model", tokenizer_with(puts_bos=True, pad="[PAD]", template=template), 400)
    _, findings = examined(tmp_path, GOOD[:3], model)
    assert (findings["no_bos"]["level"], findings["no_bos"]["rows"]) == ("warning", named(tmp_path, 1, 2, 3))
    _, findings = examined(tmp_path, GOOD[:3], model, "chat_template.name=zephyr")
    assert "no_bos" not in findings


def test_a_token_without_an_embedding_stops_the_run(tmp_path: Path) -> None:
    """A vocabulary with a gap: fewer tokens than the highest of their numbers."""
    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "user": 3, "yes": 90}
    backend = Tokenizer(models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    template = "{% for m in messages %}{{ m.role + ' ' + m.content + ' </s> ' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)
    model = saved(tmp_path / "model", tokenizer, vocabulary=50)
    _, findings = examined(tmp_path, [{"prompt": "no", "completion": "yes"}], model)
    assert findings["vocabulary"]["level"] == "error"
    assert findings["vocabulary"]["message"].startswith("token 90 of the tokenizer has no embedding")
    _, findings = examined(tmp_path, [{"prompt": "no", "completion": "user"}], model)
    assert "vocabulary" not in findings


def test_a_pad_token_that_ends_turns_stops_the_run(tmp_path: Path) -> None:
    config, run, data = made(tmp_path, GOOD)
    data.tokenizer.pad_token = data.tokenizer.eos_token
    with pytest.raises(PreflightError, match=r"pad_ends_turns : <\|im_end\|> pads rows and ends turns"):
        preflight.check(config, data, run)


@pytest.mark.parametrize(
    "overrides",
    [["peft.r=8"], ["peft.method=none"], ["peft.r=8", "chat_template.name=llama3"], ["peft.target_modules=[q_proj]"]],
    ids=" ".join,
)
def test_parameters_are_those_of_the_trainers_model(tmp_path: Path, overrides: list[str]) -> None:
    report, _ = examined(tmp_path, GOOD, *overrides)
    model = trainers.build(*made(tmp_path, GOOD, *overrides), []).model
    assert report["parameters"] == {
        "total": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def test_an_adapter_that_fits_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"peft\.target_modules : nope matches no module of this model"):
        examined(tmp_path, GOOD, "peft.target_modules=[nope]")


# -------------------------------------------------------------------------------------------- stops and exceptions


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("data.metrics", ["data.metrics=[rouge]", "data.eval_rows=2"]),
        ("trainer.eval_steps", ["trainer.eval_steps=5"]),
    ],
)
def test_what_the_config_asks_of_held_out_rows_must_be_there(tmp_path: Path, name: str, overrides: list[str]) -> None:
    _, findings = examined(tmp_path, GOOD, *overrides)
    assert findings[name]["level"] == "error"
    report, _ = examined(tmp_path, GOOD, "data.metrics=[exact_match]", "data.eval_rows=2", "trainer.eval_steps=5")
    assert report["ok"]


def test_every_error_is_told_with_rows_and_allowing_one_leaves_the_others(tmp_path: Path) -> None:
    rows = [*GOOD, TWO_BEGINNINGS, EXTRA_END]
    for allowed, left in (("", ["double_bos", "extra_eos"]), ("double_bos", ["extra_eos"])):
        config, run, data = made(tmp_path, rows, f"preflight.allow=[{allowed}]")
        with pytest.raises(PreflightError) as error:
            preflight.check(config, data, run)
        assert [problem.partition(" ")[0] for problem in error.value.problems] == left
        way_out = f"{tmp_path}/rows.jsonl:14 (preflight.allow=[extra_eos] lets it through)"
        assert error.value.problems[-1].endswith(way_out)
    config, run, data = made(tmp_path, rows, "preflight.allow=[double_bos, extra_eos]")
    report = preflight.check(config, data, run).as_dict()
    allowed_rows = {found["name"]: found["rows"] for found in report["findings"] if "(allowed by" in found["message"]}
    assert allowed_rows == {"double_bos": named(tmp_path, 13), "extra_eos": named(tmp_path, 14)}


def test_a_disk_with_exactly_enough_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = examined(tmp_path, GOOD)[0]["disk_bytes"]
    usage = namedtuple("usage", "total used free")
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(2 * needed, 0, free))
        report, findings = examined(tmp_path, GOOD)
        assert ("disk_full" in findings) == (free < needed)
        assert report["ok"] == (free >= needed)


@pytest.mark.parametrize("due", [["trainer.save_steps=1"], ["trainer.save_steps=99", "trainer.save_minutes=0.001"]])
def test_checkpoints_and_adapter_take_the_disk_that_was_foreseen(due: list[str], tmp_path: Path) -> None:
    """Five saves of which two are kept, and a third while the newest is written.

    The random states, some 15 kB a process, and what describes the tokenizer are not counted.
    """
    config, run, data = made(tmp_path, GOOD, "trainer.max_steps=5", *due, "peft.r=64")
    report = preflight.examine(config, data, run).as_dict()
    config.trainer.save_steps = 1  # the clock may be as fast as that
    trainers.build(config, run, data, []).train()
    sizes = []
    for checkpoint in run.checkpoints.glob("checkpoint-*"):
        files = [checkpoint / name for name in ("adapter_model.safetensors", "tokenizer.json", "optimizer.pt")]
        sizes.append([file.stat().st_size for file in files])
    assert len(sizes) == 2
    # 5 %: names and shapes of 14 pairs of matrices stand beside 1.6 MB of their values
    assert report["disk_bytes"] == pytest.approx(3 * sum(sizes[0]) + sum(sizes[0][:2]), rel=0.05)


def test_little_to_learn_is_a_warning(tmp_path: Path) -> None:
    report, findings = examined(tmp_path, [{"prompt": "word " * 300, "completion": "a"}])
    assert report["tokens"]["supervised"] / report["tokens"]["total"] < 0.01
    assert findings["little_supervision"]["level"] == "warning"


# ---------------------------------------------------------------------------------------------------------- numbers


def counted(config: Config, data: Prepared, tmp_path: Path) -> dict[str, Any]:
    """What the batches of one epoch really hold, as the trainer draws them."""
    trainer = trainers.build(config, RunDirectory(tmp_path / "run"), data, [])
    batches = list(trainer.get_train_dataloader())
    computed = sum(batch["input_ids"].numel() for batch in batches)
    real = sum(len(row["input_ids"]) for row in data.train)
    supervised = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)
    return {
        "total": real,
        "supervised": supervised,
        "padding_share": round(1 - real / computed, 4),
        "batches": len(batches),
    }


@pytest.mark.parametrize(
    "overrides",
    [[], ["trainer.packing=true"], ["trainer.packing=true", "model.attn_implementation=sdpa"],
     ["trainer.train_sampling_strategy=random"]],
    ids=" ".join,
)  # fmt: skip
def test_numbers_are_those_of_the_batches(tmp_path: Path, overrides: list[str]) -> None:
    overrides = [*overrides, "trainer.per_device_train_batch_size=3", "trainer.max_length=300"]
    report, _ = examined(tmp_path, GOOD, *overrides)
    config = config_of(f"data.path={tmp_path}/rows.jsonl", *overrides)
    seen = counted(config, prepare(config), tmp_path)
    assert {name: report["tokens"][name] for name in ("total", "supervised", "padding_share")} == {
        name: seen[name] for name in ("total", "supervised", "padding_share")
    }
    assert report["steps"] == seen["batches"]
    if overrides[0] == "trainer.packing=true":
        assert (report["tokens"]["padding_share"] == 0) == (len(overrides) == 3)


def test_lengths_and_special_tokens_are_counted(tmp_path: Path) -> None:
    report, _ = examined(tmp_path, GOOD)
    data = prepare(config_of(f"data.path={tmp_path}/rows.jsonl"))
    lengths = sorted(len(row["input_ids"]) for row in data.train)
    assert (report["tokens"]["lengths"]["p0"], report["tokens"]["lengths"]["p100"]) == (lengths[0], lengths[-1])
    ends = [row["input_ids"].count(data.turn_end_id) for row in data.train]
    assert report["special_tokens"]["turn_end"][1:] == (min(ends), max(ends))


class Seen:
    """What the model is given in each optimizer step: real tokens, and with them padding."""

    def __init__(self, trainer: Any, accumulation: int):
        self.real: list[int] = []
        self.all: list[int] = []
        pad, step = trainer.processing_class.pad_token_id, trainer.training_step
        micro = 0

        def counted(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> torch.Tensor:
            nonlocal micro
            if micro % accumulation == 0:
                self.real.append(0)
                self.all.append(0)
            micro += 1
            self.real[-1] += int((inputs["input_ids"] != pad).sum())
            self.all[-1] += inputs["input_ids"].numel()
            return step(model, inputs, *rest, **more)

        trainer.training_step = counted


UNEVEN = [{"prompt": f"{i * 7919} " * (1 + i % 5), "completion": f"{i} " * (1 + i % 3)} for i in range(26)]
PACKED = ["trainer.packing=true", "trainer.max_length=64"]
MASKED = [*PACKED, "model.attn_implementation=sdpa"]


@pytest.mark.parametrize(
    ("overrides", "accumulation"),
    [([], 1), ([], 3), (["trainer.train_sampling_strategy=random"], 2), (PACKED, 1), (MASKED, 1), (MASKED, 2)],
    ids=str,
)
def test_a_real_training_takes_these_steps_tokens_and_padding(
    tmp_path: Path, overrides: list[str], accumulation: int
) -> None:
    sizes = ["trainer.per_device_train_batch_size=3", f"trainer.gradient_accumulation_steps={accumulation}"]
    report, findings = examined(tmp_path, UNEVEN, *overrides, *sizes)
    trainer = trainers.build(*made(tmp_path, UNEVEN, *overrides, *sizes), [])
    seen = Seen(trainer, accumulation)
    trainer.train()
    assert report["steps"] == trainer.state.global_step == len(seen.real)
    assert report["tokens"]["total"] == sum(seen.real)
    assert report["tokens_per_step"] == round(sum(seen.real) / len(seen.real))
    # half of the last digit that is given
    assert report["tokens"]["padding_share"] == pytest.approx(1 - sum(seen.real) / sum(seen.all), abs=0.5e-4)
    assert (report["tokens"]["padding_share"] == 0) == (overrides == PACKED)
    assert findings["padding"]["message"].startswith(f"{report['tokens']['padding_share']:.1%} ")
    assert findings["steps"]["message"] == f"{report['steps']} steps of about {report['tokens_per_step']} tokens"


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], 3),  # 12 rows in batches of 4
        (["trainer.per_device_train_batch_size=5"], 3),
        (["trainer.gradient_accumulation_steps=2"], 2),
        (["trainer.num_train_epochs=2.5"], 8),
        (["trainer.num_train_epochs=0.1"], 1),
        (["trainer.max_steps=11"], 11),
        (["data.train_rows=4"], 1),
        (["data.eval_rows=8"], 1),
    ],
    ids=str,
)
def test_steps_are_those_that_the_trainer_counts(tmp_path: Path, overrides: list[str], steps: int) -> None:
    overrides = ["trainer.per_device_train_batch_size=4", *overrides]
    assert examined(tmp_path, GOOD, *overrides)[0]["steps"] == steps
    trainer = trainers.build(*made(tmp_path, GOOD, *overrides), [])
    trainer.train()
    assert trainer.state.global_step == steps


def test_packing_says_how_full_its_rows_are(tmp_path: Path) -> None:
    report, findings = examined(tmp_path, UNEVEN, *PACKED)
    packs = trainers.build(*made(tmp_path, UNEVEN, *PACKED), []).train_dataset
    lengths = [len(pack["input_ids"]) for pack in packs]
    assert max(lengths) <= 64
    filled = sum(lengths) / len(lengths) / 64
    assert report["packing"] == {"rows": len(lengths), "filled": pytest.approx(filled, abs=0.5e-4)}
    assert findings["packing"]["message"].startswith(f"26 rows in {len(lengths)} of 64 tokens, ")
    assert "packing" not in examined(tmp_path, UNEVEN)[0]


def test_the_report_is_plain_json(tmp_path: Path) -> None:
    report, _ = examined(tmp_path, GOOD, "data.eval_rows=2")
    again = json.loads(json.dumps(report, allow_nan=False))
    assert (again["ok"], again["eval_rows"], again["rows"]["read"]) == (True, 2, 10)
    assert {key for found in again["findings"] for key in found} == {"name", "level", "message", "rows"}
