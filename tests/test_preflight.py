"""What the preflight finds on data that has it, by name, level and row; and its numbers against counted ones."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from sft_lab import preflight
from sft_lab import trainer as trainers
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.errors import PreflightError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config
from tests.data.preparing import config_of, written

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
