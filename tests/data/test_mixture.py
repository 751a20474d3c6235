"""Several sources in one training set: which rows of each, in what order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.errors import ConfigError
from tests.data.preparing import config_of, problems_of, written


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    chat = [
        {"messages": [{"role": "user", "content": f"c {i}"}, {"role": "assistant", "content": f"d {i}"}]}
        for i in range(60)
    ]
    code = [{"instruction": f"i {i}", "output": f"o {i}"} for i in range(20)]
    quiz = [{"q": f"why {i}", "a": {"text": f"because {i}"}} for i in range(20)]
    rows: dict[str, list[Any]] = {"chat": chat, "code": code, "quiz": quiz}
    return {name: written(tmp_path / f"{name}.jsonl", of) for name, of in rows.items()}


def mixed(files: dict[str, Path], *overrides: str, **more: dict[str, Any]) -> Prepared:
    settings = {name: {"path": str(path)} for name, path in files.items()}
    settings["quiz"] |= {"columns": {"prompt": "q", "completion": "a.text"}}
    for name, own in more.items():
        settings[name] |= own
    return prepare(config_of(*overrides, data="mixture", sources=settings))


def owners(data: Prepared) -> list[str]:
    return [Path(data.facts["places"][place]).stem for place in data.column("place")]


def test_sources_of_different_formats_are_concatenated(files: dict[str, Path]) -> None:
    data = mixed(files)
    assert owners(data) == ["chat"] * 60 + ["code"] * 20 + ["quiz"] * 20
    assert data.facts["mixed"] == {"chat": 60, "code": 20, "quiz": 20}
    assert "because 3" in data.tokenizer.decode(data.train[83]["input_ids"])


def test_each_source_has_its_own_share(files: dict[str, Path]) -> None:
    data = mixed(files, chat={"sample": 0.5}, code={"max_rows": 3})
    assert data.facts["mixed"] == {"chat": 30, "code": 3, "quiz": 20}


def test_interleaving_stops_with_the_first_that_has_no_rows_left(files: dict[str, Path]) -> None:
    """With equal weights and 20 rows the shorter ones end first: in n draws each has n/3, give or take."""
    data = mixed(files, "data.mix=interleave_first_exhausted")
    assert max(data.facts["mixed"].values()) <= 60
    assert 20 in (data.facts["mixed"]["code"], data.facts["mixed"]["quiz"])
    assert len({(row["place"], row["number"]) for row in data.train}) == len(data.train)  # none twice
    assert owners(data) != sorted(owners(data))


def test_interleaving_all_exhausted_repeats_the_short_ones(files: dict[str, Path]) -> None:
    data = mixed(files, "data.mix=interleave_all_exhausted")
    counts = Counter((row["place"], row["number"]) for row in data.train)
    assert len(counts) == 100  # every row at least once
    assert data.facts["mixed"]["code"] > 20


def test_weights_are_shares_of_the_rows_drawn(files: dict[str, Path]) -> None:
    """300 draws at 0.8: a standard deviation is sqrt(0.8 * 0.2 / 300) = 0.023, four of them 0.09."""
    weights = {"chat": {"weight": 8}, "code": {"weight": 1}, "quiz": {"weight": 1}}
    data = mixed(files, "data.mix=interleave_all_exhausted", "data.train_rows=300", **weights)
    drawn = data.facts["mixed"]
    assert sum(drawn.values()) == len(data.train)
    assert drawn["chat"] / len(data.train) == pytest.approx(0.8, abs=0.09)


def test_the_order_is_the_seeds(files: dict[str, Path]) -> None:
    one, two, other = (mixed(files, "data.mix=interleave_first_exhausted", f"data.seed={seed}") for seed in (1, 1, 2))
    assert owners(one) == owners(two) != owners(other)


def test_held_out_rows_come_out_of_all_sources(files: dict[str, Path]) -> None:
    data = mixed(files, "data.eval_fraction=0.3")
    assert len(data.eval) == 30
    assert len(set(data.eval["place"][:])) == 3
    trained = {(row["place"], row["number"]) for row in data.train}
    assert trained.isdisjoint((row["place"], row["number"]) for row in data.eval)
    assert len(trained) == 70


def test_train_rows_count_over_all_sources(files: dict[str, Path]) -> None:
    assert mixed(files, "data.train_rows=70").facts["mixed"] == {"chat": 60, "code": 10, "quiz": 0}


def test_duplicates_are_found_across_sources(files: dict[str, Path], tmp_path: Path) -> None:
    written(files["code"], [{"prompt": "c 3", "completion": "d 3"}, {"prompt": "c 4", "completion": "D  4"}])
    data = mixed(files)
    pairs = [[data.named(*row), data.named(*other)] for row, other in data.facts["duplicates"]["exact"]]
    assert pairs == [[f"{files['code']}:{n}", f"{files['chat']}:{m}"] for n, m in ((1, 4), (2, 5))]
    assert mixed(files, "data.deduplicate=exact").facts["mixed"] == {"chat": 60, "code": 0, "quiz": 20}


def test_a_bad_row_names_its_source(files: dict[str, Path]) -> None:
    files["code"].write_text(json.dumps({"instruction": "only"}) + "\n")
    settings = {name: {"path": str(path)} for name, path in files.items() if name != "quiz"}
    (problem,) = problems_of(config_of(data="mixture", sources=settings))
    assert problem.startswith(f"{files['code']}: row 1: ")


def test_a_mapping_to_no_format_is_told_once(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"data\.columns=.*promt"):
        mixed(files, quiz={"columns": {"promt": "q", "completion": "a.text"}})


def test_a_sample_has_its_sources_own_seed(files: dict[str, Path]) -> None:
    """Another seed of the data draws other rows of one source, and leaves one with a seed of its own as it was."""
    shares = {"chat": {"sample": 0.5, "seed": 1}, "code": {"sample": 0.5}}
    one, two = (mixed(files, f"data.seed={seed}", **shares) for seed in (1, 2))
    drawn = [[list(zip(data.column("place"), data.column("number"), strict=True)) for data in (one, two)]]
    chat, code = ([[row for row in rows if row[0] == place] for rows in drawn[0]] for place in (0, 1))
    assert chat[0] == chat[1]
    assert code[0] != code[1]
    assert [len(rows) for rows in (*chat, *code)] == [30, 30, 10, 10]


def test_a_source_gives_its_rows_in_their_order(files: dict[str, Path]) -> None:
    """However its rows are interleaved with others', and begins again with its first."""
    data = mixed(files, "data.mix=interleave_all_exhausted")
    places, drawn = data.column("place"), data.column("number")
    for place, count in enumerate((60, 20, 20)):
        own = drawn[places == place]
        assert own.tolist() == [1 + i % count for i in range(len(own))]


def test_one_row_of_a_mixture_has_its_own_numbers(files: dict[str, Path]) -> None:
    """What is said of training rows is said of those that were drawn, also where these stand side by side."""
    for seed in range(6):
        data = mixed(files, "data.mix=interleave_first_exhausted", "data.train_rows=1", f"data.seed={seed}")
        (row,) = data.train
        for name in ("place", "number", "length", "supervised"):
            assert data.column(name).tolist() == [row[name]]
        assert len(row["input_ids"]) == row["length"] == data.facts["tokens"]["total"]


def test_more_than_ten_sources_stay_in_order(tmp_path: Path) -> None:
    paths = {f"s{i}": written(tmp_path / f"{i}.jsonl", [{"text": f"row of {i}"}] * (i + 1)) for i in range(12)}
    settings = {name: {"path": str(path)} for name, path in paths.items()}
    plain = prepare(config_of(data="mixture", sources=settings))
    assert owners(plain) == [str(i) for i in range(12) for _ in range(i + 1)]
    data = prepare(config_of("data.deduplicate=exact", data="mixture", sources=settings))
    assert owners(data) == [str(i) for i in range(12)]
    assert all(f"row of {i}" in data.tokenizer.decode(row["input_ids"]) for i, row in enumerate(data.train))


def test_a_source_that_has_no_rows_left_cannot_be_interleaved(files: dict[str, Path]) -> None:
    written(files["code"], [{"prompt": "c 3", "completion": "d 3"}])
    settings = {name: {"path": str(files[name])} for name in ("chat", "code")}
    overrides = ["data.mix=interleave_all_exhausted", "data.deduplicate=exact"]
    (problem,) = problems_of(config_of(*overrides, data="mixture", sources=settings))
    assert problem.startswith("data.sources.code : no row of it is left")


def test_the_formats_of_held_out_rows_count_for_the_cache(files: dict[str, Path], tmp_path: Path) -> None:
    """They have the mixture's own mapping, beside those of its sources."""
    held_out = written(tmp_path / "eval.jsonl", [{"prompt": "p", "completion": "c", "better": "d"}])
    one = mixed(files, f"data.eval_path={held_out}")
    two = mixed(files, f"data.eval_path={held_out}", "data.columns={completion: better}")
    assert (one.eval["reference"][:], two.eval["reference"][:]) == (["c"], ["d"])


def test_a_source_that_was_renamed_is_counted_under_its_new_name(files: dict[str, Path]) -> None:
    for name in ("one", "two"):
        data = prepare(config_of(data="mixture", sources={name: {"path": str(files["chat"])}}))
        assert data.facts["mixed"] == {name: 60}
