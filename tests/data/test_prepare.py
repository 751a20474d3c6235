"""The data of a run as a whole: which rows are left, what is recorded of the others, what is learned of them."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_lab import config as configs
from sft_lab import preflight
from sft_lab.data.batches import TrainingRows
from sft_lab.data.prepare import evaluation_rows, prepare
from sft_lab.data.prepared import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.errors import PreflightError
from sft_lab.runs import RunDirectory
from tests.data.preparing import config_of, names, numbers, prepared_from, written

TOKENS = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
GOOD = [{"prompt": f"what is {i} plus {i}?", "completion": f"it is {i + i}"} for i in range(20)]
Prepare = Callable[..., Prepared]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    """Prepare `rows`, written to rows.jsonl, for tiny_llama under further overrides."""

    def run(rows: list[Any], *overrides: str) -> Prepared:
        return prepared_from(written(tmp_path / "rows.jsonl", rows), *overrides)

    return run


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
    assert numbers(data.train) == [1, 2, 4, 7, 8]
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
    assert numbers(data.train) == [1, 3]


@pytest.mark.parametrize("deduplicate", ["none", "exact", "near"])
def test_nothing_left_is_refused(prepared: Prepare, deduplicate: str) -> None:
    (problem,) = refused(prepared, [{"prompt": "a"}] * 3, "data.on_bad_row=skip", f"data.deduplicate={deduplicate}")
    assert "no row is left to train on" in problem
    assert "'bad': 3" in problem


def test_reading_stops_where_it_is_no_use(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad row far from the end of a large file must not cost the hours that reading all of it takes."""
    monkeypatch.setattr("sft_lab.data.prepare._HOPELESS_ROWS", 600)
    rows = [GOOD[0], {"prompt": "a"}, *[TOKENS] * 2000]
    one, last = refused(prepared, rows)
    assert "rows.jsonl: row 2: " in one
    assert last == "reading stopped after 1000 rows"  # rows are converted 500 at a time
    assert "stopped" not in "".join(refused(prepared, rows[:600]))
    many = refused(prepared, [*rows[:2], *[{"prompt": "a"}] * 2000])
    assert many[-2:] == ["and 979 more rows", "reading stopped after 1000 rows"]
    assert len(prepared(rows, "data.on_bad_row=skip").train) == 2001


def test_a_row_of_weight_0_is_left_out_and_counted(prepared: Prepare) -> None:
    data = prepared([GOOD[0], GOOD[1] | {"weight": 0}, GOOD[2] | {"weight": 1}])
    assert numbers(data.train) == [1, 3]
    assert data.facts["rows"] == {"read": 3, "kept": 2, "dropped": {"weight_0": 1}}
    assert data.facts["dropped_rows"] == {"weight_0": [[0, 2]]}


def test_what_is_read_is_kept_or_dropped(prepared: Prepare, tmp_path: Path) -> None:
    """Held-out rows that are left out are none of those read for training."""
    (tmp_path / "eval.jsonl").write_text(json.dumps(GOOD[0]) + "\n{}\n{}\n")
    rows = prepared([*GOOD[:4], {}], f"data.eval_path={tmp_path}/eval.jsonl", "data.on_bad_row=skip").facts["rows"]
    assert rows["read"] == rows["kept"] + sum(rows["dropped"].values())


# ------------------------------------------------------------------------------------------------------ long rows

LONG = {"prompt": "short", "completion": "word " * 60}
LONG_PROMPT = {"prompt": "word " * 60, "completion": "short"}


def chat(*exchanges: tuple[str, str], system: str = "") -> dict[str, Any]:
    said = [{"role": "system", "content": system}] if system else []
    for question, answer in exchanges:
        said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": said}


def learned(data: Prepared, row: dict[str, Any]) -> str:
    """The text of the tokens that carry loss."""
    return str(data.tokenizer.decode([label for label in row["labels"] if label != IGNORE]))


def test_long_rows_are_dropped_and_recorded(prepared: Prepare, tmp_path: Path) -> None:
    data = prepared([GOOD[0], LONG, GOOD[1]], "trainer.max_length=64")
    assert numbers(data.train) == [1, 3]
    assert data.facts["rows"]["dropped"] == {"long": 1}
    assert [data.named(*row) for row in data.facts["dropped_rows"]["long"]] == [f"{tmp_path}/rows.jsonl:2"]


def test_long_rows_are_cut_where_some_of_the_answer_is_left(prepared: Prepare, tmp_path: Path) -> None:
    options = ["trainer.max_length=64", "data.on_long_row=truncate"]
    data, whole = prepared([GOOD[0], LONG, LONG_PROMPT], *options), prepared([LONG])
    assert numbers(data.train) == [1, 2]
    assert data.train[1]["input_ids"] == whole.train[0]["input_ids"][:64]
    assert data.train[1]["labels"] == whole.train[0]["labels"][:64]
    assert data.facts["shortened_rows"] == {"truncated": [[0, 2]]}
    assert data.facts["dropped_rows"] == {"long": [[0, 3]]}  # its answer lies behind the cut


def test_the_end_of_long_rows_is_kept_where_the_left_is_cut_off(prepared: Prepare) -> None:
    options = ["trainer.max_length=64", "data.on_long_row=truncate", "data.truncation_side=left"]
    data, whole = prepared([LONG, LONG_PROMPT], *options), prepared([LONG, LONG_PROMPT])
    assert numbers(data.train) == [1, 2]
    for row, before in zip(data.train, whole.train, strict=True):
        assert row["input_ids"] == before["input_ids"][-64:]
        assert row["labels"] == [IGNORE, *before["labels"][-63:]]  # nothing is left that could predict the first
    assert data.facts["shortened_rows"] == {"truncated": [[0, 1], [0, 2]]}


def test_long_conversations_are_split_between_exchanges(prepared: Prepare) -> None:
    """Each part begins with the system prompt, and all parts together learn what the row would have."""
    row = chat(*((f"q {i}", f"a {i} " + "word " * 4) for i in range(6)), system="be brief")
    whole = prepared([row])
    data = prepared([GOOD[0], row, GOOD[1]], "trainer.max_length=64", "data.on_long_row=split")
    parts = [part for part in data.train if part["number"] == 2]
    assert len(parts) > 1
    assert names(data) == ["rows.jsonl:1", *(f"rows.jsonl:2#{i + 1}" for i in range(len(parts))), "rows.jsonl:3"]
    assert all(len(part["input_ids"]) <= 64 for part in parts)
    assert all("be brief" in data.tokenizer.decode(part["input_ids"]) for part in parts)
    assert "".join(learned(data, part) for part in parts) == learned(whole, whole.train[0])
    assert data.facts["shortened_rows"] == {"split": [[0, 2]]}
    assert data.facts["rows"] == {"read": 3, "kept": 2 + len(parts), "dropped": {}}


def test_what_of_a_split_row_fits_in_no_part_is_counted(prepared: Prepare) -> None:
    row = chat(("a", "first"), ("b", "word " * 80), ("c", "third"))
    data = prepared([row], "trainer.max_length=64", "data.on_long_row=split")
    assert [learned(data, part).removesuffix("<|im_end|>") for part in data.train] == ["first", "third"]
    assert data.facts["shortened_rows"] == {"split": [[0, 1]], "split_in_part": [[0, 1]]}


@pytest.mark.parametrize("loss", ["last_turn", "completion"])
def test_parts_of_a_split_row_learn_no_more_than_the_row_would(prepared: Prepare, loss: str) -> None:
    row = chat(*((f"question {i}", f"answer {i} " + "word " * 12) for i in range(6)))
    options = ["data.on_long_row=split", f"data.loss={loss}"]
    whole, data = prepared([row], *options), prepared([row], *options, "trainer.max_length=64")
    assert [learned(data, part) for part in data.train] == [learned(whole, whole.train[0])]
    assert "answer 5" in learned(data, data.train[0])


def test_a_long_text_is_split_into_all_of_its_tokens(prepared: Prepare) -> None:
    whole = prepared([{"text": "some words " * 60}]).train[0]["input_ids"]
    data = prepared([{"text": "some words " * 60}], "trainer.max_length=64", "data.on_long_row=split")
    assert [token for part in data.train for token in part["input_ids"]] == whole
    assert all(len(part["input_ids"]) == 64 for part in list(data.train)[:-1])
    assert all(part["labels"] == [IGNORE, *part["input_ids"][1:]] for part in data.train)
    assert names(data)[:2] == ["rows.jsonl:1#1", "rows.jsonl:1#2"]


def test_ready_tokens_have_no_turns_to_split_at(prepared: Prepare) -> None:
    data = prepared([TOKENS, {"input_ids": [7] * 65}], "trainer.max_length=64", "data.on_long_row=split")
    assert numbers(data.train) == [1]
    assert data.facts["dropped_rows"] == {"long": [[0, 2]]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["drop", "truncate", "split"])
def test_no_row_loses_what_it_teaches_unseen(prepared: Prepare, how: str, side: str) -> None:
    """Every row that was read trains as it would have, or is named as shortened or as left out."""
    rows = [
        GOOD[0],
        LONG,
        LONG_PROMPT,
        chat(*[("q", "word " * 9)] * 9),
        {"text": "text " * 99},
        {"text": "short"},
        TOKENS,
    ]
    whole = {row["number"]: row["labels"] for row in prepared(rows).train}
    data = prepared(rows, "trainer.max_length=64", f"data.on_long_row={how}", f"data.truncation_side={side}")
    trained: dict[int, list[list[int]]] = {}
    for row in data.train:
        assert any(label != IGNORE for label in row["labels"])
        trained.setdefault(row["number"], []).append(row["labels"])
    shortened = {number for named in data.facts["shortened_rows"].values() for _, number in named}
    dropped = {number for named in data.facts["dropped_rows"].values() for _, number in named}
    for number in whole:
        assert (number in trained) != (number in dropped)
        assert (trained.get(number) == [whole[number]]) == (number not in shortened | dropped)
    assert {1, 6, 7} <= trained.keys() - shortened
    assert data.facts["rows"]["dropped"] == ({"long": len(dropped)} if dropped else {})


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


# ------------------------------------------------------------------------------------------------ duplicates, leaks

STORY = " ".join(f"word{i}" for i in range(100))


def story(*changed: int) -> dict[str, str]:
    words = STORY.split()
    for place in changed:
        words[place] = "other"
    return {"prompt": "tell me", "completion": " ".join(words)}


# Row 3 is row 1 with other capitals and spaces, row 5 is row 4 with one word of a hundred changed.
COPIES = [GOOD[0], GOOD[1], {k: f"{v.upper()} " for k, v in GOOD[0].items()}, story(), story(50), GOOD[1]]


@pytest.mark.parametrize(
    ("deduplicate", "kept"), [("none", [1, 2, 3, 4, 5, 6]), ("exact", [1, 2, 4, 5]), ("near", [1, 2, 4])]
)
def test_repeated_rows_are_named_and_left_out_where_asked(prepared: Prepare, deduplicate: str, kept: list[int]) -> None:
    data = prepared(COPIES, f"data.deduplicate={deduplicate}")
    assert numbers(data.train) == kept
    pairs = {kind: [(row[1], other[1]) for row, other in of] for kind, of in data.facts["duplicates"].items()}
    assert pairs == {"exact": [(3, 1), (6, 2)], "near": [(5, 4)]}
    dropped = [n for n in range(1, 7) if n not in kept]
    assert data.facts["dropped_rows"] == ({"duplicate": [[0, n] for n in dropped]} if dropped else {})
    assert data.facts["rows"] == {
        "read": 6, "kept": len(kept), "dropped": {"duplicate": len(dropped)} if dropped else {}
    }  # fmt: skip
    assert data.facts["tokens"]["total"] == sum(data.column("length"))


def test_parts_of_one_row_are_no_duplicates_of_each_other(prepared: Prepare) -> None:
    row = chat(*((f"question {i}", f"answer {i} " + "word " * 12) for i in range(6)))
    options = ["trainer.max_length=64", "data.on_long_row=split", "data.deduplicate=near"]
    once, twice = prepared([row], *options), prepared([row, GOOD[0], row], *options)
    assert names(twice) == [*names(once), "rows.jsonl:2"]
    assert twice.facts["dropped_rows"] == {"duplicate": [[0, 3]]}


@pytest.fixture
def leaking(prepared: Prepare, tmp_path: Path) -> Callable[..., tuple[Any, Prepared]]:
    """Rows 2 and 4 give away held-out rows 2 and 1; the config and the data."""
    held_out = written(tmp_path / "eval.jsonl", [story(50), GOOD[7], GOOD[8]])

    def run(*overrides: str) -> tuple[Any, Prepared]:
        given = [f"data.eval_path={held_out}", *overrides]
        data = prepared([GOOD[0], {k: v.upper() for k, v in GOOD[7].items()}, GOOD[1], story()], *given)
        return config_of(*given), data

    return run


def test_rows_that_give_held_out_rows_away_stop_the_run(leaking: Any, tmp_path: Path) -> None:
    config, data = leaking()
    assert data.facts["leaks"] == [[0, 2, 1, "exact"], [0, 4, 0, "near"]]
    with pytest.raises(PreflightError) as error:
        preflight.check(config, data, RunDirectory(tmp_path / "run"))
    (problem,) = error.value.problems
    for row, held_out, kind in ((2, 2, "exact"), (4, 1, "near")):
        assert f"{tmp_path}/rows.jsonl:{row} gives away {tmp_path}/eval.jsonl:{held_out} ({kind})" in problem
    assert "data.on_leak=drop" in problem


def test_rows_that_give_held_out_rows_away_are_left_out_where_asked(leaking: Any, tmp_path: Path) -> None:
    config, data = leaking("data.on_leak=drop")
    assert numbers(data.train) == [1, 3]
    assert numbers(data.eval) == [1, 2, 3]  # what is measured stays the same
    assert data.facts["rows"] == {"read": 4, "kept": 2, "dropped": {"leak": 2}}
    assert data.facts["dropped_rows"] == {"leak": [[0, 2], [0, 4]]}
    assert preflight.check(config, data, RunDirectory(tmp_path / "run")).errors == []


# ---------------------------------------------------------------------------------------------------- split, seed


def test_held_out_rows_are_a_seeded_part_of_the_file(prepared: Prepare) -> None:
    first, again = (prepared(GOOD, "data.eval_rows=5") for _ in range(2))
    other = prepared(GOOD, "data.eval_rows=5", "data.seed=7")
    for data in (first, again, other):
        assert (len(data.train), len(data.eval)) == (15, 5)
        assert sorted(numbers(data.train) + numbers(data.eval)) == list(range(1, 21))
    assert numbers(first.eval) == numbers(again.eval)
    assert numbers(first.eval) not in (numbers(other.eval), [16, 17, 18, 19, 20])


def test_the_held_out_rows_stay_the_same_with_fewer_training_rows(prepared: Prepare) -> None:
    """So that losses of runs on more and less data can be compared."""
    all_, few = prepared(GOOD, "data.eval_rows=5"), prepared(GOOD, "data.eval_rows=5", "data.train_rows=4")
    assert numbers(few.eval) == numbers(all_.eval)
    assert numbers(few.train) == numbers(all_.train)[:4]


def test_which_rows_are_held_out_follows_the_runs_seed() -> None:
    words = ["model=tiny_llama", "data=from_file", "data.path=x", "seed=7"]
    assert configs.to_config(configs.compose(words)).data.seed == 7


def test_a_share_of_the_rows_is_held_out(prepared: Prepare) -> None:
    by_share, by_count = prepared(GOOD, "data.eval_fraction=0.25"), prepared(GOOD, "data.eval_rows=5")
    assert numbers(by_share.eval) == numbers(by_count.eval)
    assert numbers(by_share.train) == numbers(by_count.train)
    (problem,) = refused(prepared, GOOD, "data.eval_fraction=1")
    assert problem.startswith("data.eval_fraction=1 : ")


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
    config = config_of(f"data.path={tmp_path}/rows.jsonl", "data.eval_rows=5")
    rows = evaluation_rows(config, data.tokenizer, data.template)
    assert rows.remove_columns("id").to_list() == data.eval.to_list()
    assert rows["id"][:] == [data.row_id(row) for row in data.eval]


# ------------------------------------------------------------------------------------------------ tokens, packing


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("assistant", ["a1<|im_end|>a2<|im_end|>", "c<|im_end|>", "d2<|im_end|>"]),
        ("completion", ["a2<|im_end|>", "c<|im_end|>", None]),
        ("last_turn", ["a2<|im_end|>", "c<|im_end|>", None]),
        ("all", None),
    ],
)
def test_what_carries_loss_is_what_data_loss_says(prepared: Prepare, loss: str, said: list[str | None] | None) -> None:
    """The third row's last answer has weight 0: there is nothing to learn from it where only that would count."""
    zero = chat(("q", "d1"), ("q", "d2"), ("q", "d3"))
    zero["messages"][1]["weight"] = zero["messages"][5]["weight"] = 0
    rows = [chat(("q1", "a1"), ("q2", "a2")), {"prompt": "p", "completion": "c"}, zero]
    data = prepared(rows, f"data.loss={loss}", "data.on_bad_row=skip")
    if said is None:
        assert all(row["labels"] == [IGNORE, *row["input_ids"][1:]] for row in data.train)
        assert len(data.train) == 3
    else:
        assert [learned(data, row) for row in data.train] == [words for words in said if words is not None]


def test_texts_and_ready_tokens_train_beside_conversations(prepared: Prepare) -> None:
    data = prepared([GOOD[0], {"text": "just a text"}, TOKENS])
    chat_, text, tokens = data.train
    assert data.tokenizer.decode(text["input_ids"]) == f"just a text{data.tokenizer.eos_token}"
    assert text["labels"] == [IGNORE, *text["input_ids"][1:]]
    assert {name: tokens[name] for name in TOKENS} == TOKENS
    assert (chat_["turns"], text["turns"], tokens["turns"]) == ("user assistant+", "", "")


def test_held_out_texts_and_tokens_have_a_loss_and_nothing_to_ask(prepared: Prepare, tmp_path: Path) -> None:
    held_out = written(tmp_path / "eval.jsonl", [{"text": "just a text"}, GOOD[9], TOKENS])
    data = prepared(GOOD[:3], f"data.eval_path={held_out}")
    assert numbers(data.eval) == [1, 2, 3]
    assert numbers(data.questions) == [2]


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
    config = config_of(*options, "trainer.packing=true")
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
    data = prepared(GOOD, "data.eval_rows=5", "chat_template.name=zephyr")
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
    data = prepare(config_of("data.train_rows=12", "data.eval_rows=4", "trainer.max_length=512", data="requests"))
    assert (len(data.train), len(data.eval)) == (12, 4)
    assert data.facts["rows"] == {"read": 12, "kept": 12, "dropped": {}}


# ---------------------------------------------------------------------------------------------- processes and memory


def arrow_files(data: Prepared) -> dict[str, bytes]:
    assert data.folder is not None
    return {file.name: file.read_bytes() for file in data.folder.iterdir() if file.name != "key.json"}


def test_several_processes_make_the_bytes_of_one(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    """In more chunks than wait for a process at once; bad and long rows are accounted in order, too."""
    monkeypatch.setattr("sft_lab.data.convert._CHUNK", 100)
    rows = [GOOD[i % 20] | {"prompt": f"question {i}"} for i in range(1200)]
    rows[3], rows[777] = {"prompt": "no answer"}, LONG
    options = ["data.on_bad_row=skip", "trainer.max_length=64", "data.eval_rows=5"]
    one = prepared(rows, *options, "data.num_proc=1")
    expected = arrow_files(one)
    assert one.folder is not None
    shutil.rmtree(one.folder)
    several = prepared(rows, *options, "data.num_proc=2")
    assert several.facts["cache"].startswith("cache miss")
    assert arrow_files(several) == expected
    assert {"train-0.arrow", "eval.arrow", "facts.json"} <= expected.keys()


def test_memory_does_not_grow_with_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4000 more rows next to nothing is held: some numbers of each, about 200 bytes, where a row read has 1800."""
    monkeypatch.setattr("sft_lab.data.prepare._COMPARED_BYTES", 0)  # near duplicates take memory, up to this limit
    ids = list(range(300, 340))
    peaks = []
    for count in (1, 2000, 6000):  # the first imports what is not to be counted
        path = written(tmp_path / f"{count}.jsonl", ({"input_ids": [i % 900, i // 900, *ids]} for i in range(count)))
        tracemalloc.start()
        try:
            row = json.loads(path.read_text().splitlines()[-1])
            a_row = tracemalloc.get_traced_memory()[0]
            del row
            tracemalloc.reset_peak()
            assert len(prepared_from(path).train) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert a_row > 1000
    assert peaks[2] - peaks[1] < 4000 * a_row / 5
