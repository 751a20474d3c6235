"""The data of a run as a whole: which rows are left, what is recorded of the others, how they are split and packed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_lab import config as configs
from sft_lab.data.batches import TrainingRows
from sft_lab.data.prepare import evaluation_rows, prepare
from sft_lab.data.prepared import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.errors import PreflightError
from sft_lab.runs import RunDirectory

GOOD = [{"prompt": f"what is {i} plus {i}?", "completion": f"it is {i + i}"} for i in range(20)]
Prepare = Callable[..., Prepared]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    """Prepare `rows`, written to rows.jsonl, for tiny_llama under further overrides."""

    def run(rows: list[Any], *overrides: str) -> Prepared:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        words = ["model=tiny_llama", "data=from_file", f"data.path={path}", *overrides]
        return prepare(configs.to_config(configs.compose(words)))

    return run


def ids(dataset: Any) -> list[int]:
    """The rows' numbers in rows.jsonl."""
    return list(dataset["number"])


def refused(prepared: Prepare, *args: Any) -> list[str]:
    with pytest.raises(PreflightError) as error:
        prepared(*args)
    return error.value.problems


# ------------------------------------------------------------------------------------------------------- bad rows

BAD = {3: ({"prompt": "a"}, "fit no format"), 5: ('{"prompt"', "broken JSON"), 6: ([1], "a list where an object")}


def with_bad_rows() -> list[Any]:
    return [BAD[n][0] if n in BAD else row for n, row in enumerate(GOOD[:8], start=1)]


def test_bad_rows_are_listed_with_file_row_and_reason(prepared: Prepare, tmp_path: Path) -> None:
    problems = refused(prepared, with_bad_rows())
    assert len(problems) == len(BAD)
    for problem, (number, (_, reason)) in zip(problems, BAD.items(), strict=True):
        assert problem.startswith(f"{tmp_path}/rows.jsonl: row {number}: ")
        assert reason in problem
    assert sum("data.on_bad_row=skip" in problem for problem in problems) == 1


def test_many_bad_rows_are_counted(prepared: Prepare) -> None:
    problems = refused(prepared, [{"prompt": "a"}] * 33)
    assert len(problems) == 21
    assert problems[-1] == "and 13 more rows"


def test_skipping_keeps_the_rest_and_records_which(prepared: Prepare, tmp_path: Path) -> None:
    data = prepared(with_bad_rows(), "data.on_bad_row=skip")
    assert ids(data.train) == [1, 2, 4, 7, 8]
    assert data.facts["rows"] == {"read": 8, "kept": 5, "dropped": {"bad": 3}}
    for record, (number, (_, reason)) in zip(data.facts["bad_rows"], BAD.items(), strict=True):
        assert data.named(*record[:2]) == f"{tmp_path}/rows.jsonl:{number}"
        assert reason in record[2]
    assert data.facts["dropped_rows"]["bad"] == [record[:2] for record in data.facts["bad_rows"]]


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "half an emoji \ud83d", "completion": "yes"},
        {"messages": [{"role": "user", "content": "no answer"}]},
    ],
    ids=["no unicode", "no answer"],
)
def test_any_row_that_cannot_be_used_is_a_bad_row(prepared: Prepare, bad: Any) -> None:
    data = prepared([GOOD[0], bad, GOOD[1]], "data.on_bad_row=skip")
    assert ids(data.train) == [1, 3]


def test_nothing_left_is_refused(prepared: Prepare) -> None:
    (problem,) = refused(prepared, [{"prompt": "a"}] * 3, "data.on_bad_row=skip")
    assert "no row is left to train on" in problem


def test_what_is_read_is_kept_or_dropped(prepared: Prepare, tmp_path: Path) -> None:
    """Held-out rows that are left out are none of those read for training."""
    (tmp_path / "eval.jsonl").write_text(json.dumps(GOOD[0]) + "\n{}\n{}\n")
    rows = prepared([*GOOD[:4], {}], f"data.eval_path={tmp_path}/eval.jsonl", "data.on_bad_row=skip").facts["rows"]
    assert rows["read"] == rows["kept"] + sum(rows["dropped"].values())


# ------------------------------------------------------------------------------------------------------ long rows

LONG = {"prompt": "short", "completion": "word " * 60}
LONG_PROMPT = {"prompt": "word " * 60, "completion": "short"}


def test_long_rows_are_dropped_and_recorded(prepared: Prepare, tmp_path: Path) -> None:
    data = prepared([GOOD[0], LONG, GOOD[1]], "trainer.max_length=64")
    assert ids(data.train) == [1, 3]
    assert data.facts["rows"]["dropped"] == {"long": 1}
    assert [data.named(*row) for row in data.facts["dropped_rows"]["long"]] == [f"{tmp_path}/rows.jsonl:2"]


def test_long_rows_are_cut_where_some_of_the_answer_is_left(prepared: Prepare, tmp_path: Path) -> None:
    options = ["trainer.max_length=64", "data.on_long_row=truncate"]
    data, whole = prepared([GOOD[0], LONG, LONG_PROMPT], *options), prepared([LONG])
    assert ids(data.train) == [1, 2]
    assert data.train[1]["input_ids"] == whole.train[0]["input_ids"][:64]
    assert data.train[1]["labels"] == whole.train[0]["labels"][:64]
    assert data.facts["shortened_rows"] == {"truncated": [[0, 2]]}
    assert data.facts["dropped_rows"] == {"long": [[0, 3]]}  # its answer lies behind the cut


def test_long_rows_are_an_error_where_that_is_asked_for(prepared: Prepare, tmp_path: Path) -> None:
    problems = refused(prepared, [GOOD[0], LONG, LONG_PROMPT], "trainer.max_length=64", "data.on_long_row=error")
    assert [problem.split(" tokens, ")[1] for problem in problems] == ["more than trainer.max_length=64"] * 2
    assert [problem.split(": ")[:2] for problem in problems] == [
        [f"{tmp_path}/rows.jsonl", "row 2"],
        [f"{tmp_path}/rows.jsonl", "row 3"],
    ]


def test_a_row_of_exactly_max_length_is_whole(prepared: Prepare) -> None:
    length = len(prepared([LONG]).train[0]["input_ids"])
    assert len(prepared([LONG], f"trainer.max_length={length}").train[0]["input_ids"]) == length
    assert "no row is left" in refused(prepared, [LONG], f"trainer.max_length={length - 1}")[0]


# ---------------------------------------------------------------------------------------------------- split, seed


def test_held_out_rows_are_a_seeded_part_of_the_file(prepared: Prepare) -> None:
    first, again = (prepared(GOOD, "data.eval_rows=5") for _ in range(2))
    other = prepared(GOOD, "data.eval_rows=5", "seed=7")
    for data in (first, again, other):
        assert (len(data.train), len(data.eval)) == (15, 5)
        assert sorted(ids(data.train) + ids(data.eval)) == list(range(1, 21))
    assert ids(first.eval) == ids(again.eval)
    assert ids(first.eval) not in (ids(other.eval), [16, 17, 18, 19, 20])


def test_the_held_out_rows_stay_the_same_with_fewer_training_rows(prepared: Prepare) -> None:
    """So that losses of runs on more and less data can be compared."""
    all_, few = prepared(GOOD, "data.eval_rows=5"), prepared(GOOD, "data.eval_rows=5", "data.train_rows=4")
    assert ids(few.eval) == ids(all_.eval)
    assert ids(few.train) == ids(all_.train)[:4]


@pytest.mark.parametrize("count", [20, 21])
def test_holding_out_everything_is_refused(prepared: Prepare, count: int) -> None:
    (problem,) = refused(prepared, GOOD, f"data.eval_rows={count}")
    assert problem.startswith(f"data.eval_rows={count} : ")
    assert "(allowed: 0 to 19)" in problem


def test_held_out_rows_have_prompt_and_reference(prepared: Prepare) -> None:
    data = prepared(GOOD, "data.eval_rows=5")
    for row in data.eval:
        number = row["number"]
        assert row["reference"] == GOOD[number - 1]["completion"]
        assert row["input_ids"][: len(row["prompt_ids"])] == row["prompt_ids"]
        assert row["labels"][len(row["prompt_ids"]) - 1] == IGNORE
        assert row["labels"][len(row["prompt_ids"])] != IGNORE


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "Welcome!"}],
        [{"role": "assistant", "content": "Welcome!"}, {"role": "user", "content": "hi"}],
    ],
    ids=["alone", "then a user"],
)
def test_a_held_out_row_with_nothing_before_its_answer(prepared: Prepare, tmp_path: Path, messages: Any) -> None:
    """It can be asked of a model or left out as bad, but is no reason to end with a traceback."""
    (tmp_path / "eval.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    data = prepared(GOOD[:4], f"data.eval_path={tmp_path}/eval.jsonl", "data.on_bad_row=skip")
    assert len(data.train) == 4


def test_evaluation_rows_are_those_held_out_in_training(prepared: Prepare, tmp_path: Path) -> None:
    data = prepared(GOOD, "data.eval_rows=5")
    words = ["model=tiny_llama", "data=from_file", f"data.path={tmp_path}/rows.jsonl", "data.eval_rows=5"]
    rows = evaluation_rows(configs.to_config(configs.compose(words)), data.tokenizer, data.template)
    assert rows.remove_columns("id").to_list() == data.eval.to_list()
    assert rows["id"][:] == [data.row_id(row) for row in data.eval]


# ------------------------------------------------------------------------------------------------ tokens, packing


def test_every_trained_turn_ends_with_its_end_token(prepared: Prepare) -> None:
    turns = [{"role": r, "content": f"{r} {i}"} for i in range(3) for r in ("user", "assistant")]
    data = prepared([{"messages": turns}, *({"messages": turns[: 2 * n]} for n in (1, 2))])
    assert [row["labels"].count(data.turn_end_id) for row in data.train] == [3, 1, 2]
    assert data.facts["tokens"] == {
        "total": sum(len(row["input_ids"]) for row in data.train),
        "supervised": sum(label != IGNORE for row in data.train for label in row["labels"]),
    }


def test_packing_keeps_every_row_whole(prepared: Prepare) -> None:
    rows = [{"prompt": "word " * (i % 7), "completion": "answer " * (1 + i % 5)} for i in range(40)]
    options = ["trainer.max_length=64"]
    plain, packed = prepared(rows, *options), prepared(rows, *options, "trainer.packing=true")
    documents = []
    config = configs.to_config(configs.compose(["model=tiny_llama", *options, "trainer.packing=true"]))
    packs = list(TrainingRows(packed.train, packed.column("length"), config))
    for row in packs:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 64
        start = 0
        for length in row["seq_lengths"]:
            documents.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    assert sorted(documents) == sorted((row["input_ids"], row["labels"]) for row in plain.train)
    assert len(packs) < len(plain.train)
    assert all(labels[0] == IGNORE for _, labels in documents)  # nothing predicts it but another row
    assert packed.facts["tokens"] == plain.facts["tokens"]


@pytest.mark.parametrize("packing", [False, True])
def test_the_same_config_gives_the_same_data(prepared: Prepare, packing: bool) -> None:
    options = ["data.eval_rows=5", f"trainer.packing={packing}"]
    one, two = prepared(GOOD, *options), prepared(GOOD, *options)
    assert one.train.to_list() == two.train.to_list()
    assert one.eval.to_list() == two.eval.to_list()
    assert one.facts | {"cache": ""} == two.facts | {"cache": ""}
    assert one.facts["cache"].startswith("cache miss")
    assert two.facts["cache"].startswith("cache hit")


def test_what_was_saved_is_what_is_loaded(prepared: Prepare, tmp_path: Path) -> None:
    """Training reads the run directory, so nothing that was decided here may be lost in it."""
    data = prepared(GOOD, "data.eval_rows=5", "chat_template=zephyr")
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    data.save(run)
    loaded = Prepared.load(run)
    assert loaded.train.to_list() == data.train.to_list()
    assert loaded.eval.to_list() == data.eval.to_list()
    assert loaded.facts == data.facts
    for name in ("chat_template", "pad_token_id", "eos_token_id"):
        assert getattr(loaded.tokenizer, name) == getattr(data.tokenizer, name)


def test_requests_are_made_to_order() -> None:
    words = ["model=tiny_llama", "data.train_rows=12", "data.eval_rows=4", "trainer.max_length=512"]
    data = prepare(configs.to_config(configs.compose(words)))
    assert (len(data.train), len(data.eval)) == (12, 4)
    assert data.facts["rows"] == {"read": 12, "kept": 12, "dropped": {}}
