"""Directories and globs whose files are of several splits: one of them may be held out, so they are not mixed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sft_lab.data.files import files_of
from sft_lab.errors import PreflightError


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def refused(path: Path | str) -> str:
    with pytest.raises(PreflightError) as error:
        files_of(str(path))
    (problem,) = error.value.problems
    return problem


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        (["train.jsonl", "test.jsonl"], ["test.jsonl", "train.jsonl"]),
        (
            ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
            ["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"],
        ),
        (["train/0.jsonl", "train/1.jsonl", "val/0.jsonl"], ["train", "val/0.jsonl"]),
        (["train_1.csv", "train_2.csv", "dev.csv"], ["train_*.csv", "dev.csv"]),
        (["gsm8k_train.jsonl", "gsm8k_test.jsonl"], ["gsm8k_test.jsonl", "gsm8k_train.jsonl"]),
        (["a.jsonl", "b.jsonl", "held-out.jsonl"], ["held-out.jsonl"]),
        (["a.jsonl", "Validation/b.jsonl"], ["Validation/b.jsonl"]),
        (["train.jsonl.gz", "valid.jsonl.gz"], ["train.jsonl.gz", "valid.jsonl.gz"]),
        (["test_data.jsonl", "dev_data.jsonl"], ["dev_data.jsonl", "test_data.jsonl"]),
        (["training.txt", "holdout.txt"], ["holdout.txt", "training.txt"]),
        (["train1.jsonl", "eval1.jsonl"], ["train1.jsonl", "eval1.jsonl"]),
        (["train_sft-00000-of-00001.parquet", "test_sft-00000-of-00001.parquet"], ["test_sft-00000-of-00001.parquet"]),
    ],
)
@pytest.mark.parametrize("place", ["directory", "glob"])
def test_several_splits_are_refused_with_what_means_one(
    names: list[str], allowed: list[str], place: str, tmp_path: Path
) -> None:
    fill(tmp_path, *names)
    given = str(tmp_path) if place == "directory" else f"{tmp_path}/**/*.*"
    problem = refused(given)
    assert problem.startswith(f"{given}: holds files of several splits (")
    named = re.search(r"allowed: one of (.*); several: data=mixture", problem)
    assert named is not None
    for path in named[1].split(", "):
        assert files_of(path)
        assert len(files_of(path)) < len(names)
    assert {str(tmp_path / name) for name in allowed} <= set(named[1].split(", "))


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["test/a.jsonl", "test/b.jsonl", "test.jsonl"],
        ["train.jsonl", "more.jsonl"],
        ["contest.jsonl", "latest.parquet", "developer.jsonl", "validity.csv", "trainer.json", "evaluate.txt"],
        ["train.jsonl", "unit_test_cases.jsonl", "devices.jsonl"],
        ["a.jsonl", "b.jsonl"],
    ],
)
def test_one_split_and_names_that_are_no_splits_are_read(names: list[str], tmp_path: Path) -> None:
    fill(tmp_path, *names)
    assert len(files_of(str(tmp_path))) == len(names)


def test_what_is_above_the_directory_says_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "test", "train/a.jsonl", "train/b.jsonl")
    assert len(files_of(str(tmp_path / "test" / "train"))) == 2
    assert len(files_of(str(tmp_path / "test"))) == 2


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/a-*
  - split: test
    path: [data/b.jsonl]
---
# Rows
"""
SPLITS = """---
dataset_info:
  splits:
  - name: easy
    num_examples: 1
  - name: hard
    num_examples: 1
---
"""


@pytest.mark.parametrize(
    ("file", "said", "names"),
    [
        ("README.md", CARD, ["data/a-1.jsonl", "data/a-2.jsonl", "data/b.jsonl"]),
        ("README.md", SPLITS, ["data/easy-00000-of-00001.parquet", "data/hard-00000-of-00001.parquet"]),
        ("dataset_infos.json", json.dumps({"default": {"splits": {"easy": {}, "hard": {}}}}), ["easy.csv", "hard.csv"]),
    ],
)
def test_what_came_with_the_files_says_their_splits(file: str, said: str, names: list[str], tmp_path: Path) -> None:
    fill(tmp_path, *names)
    assert len(files_of(str(tmp_path))) == len(names)
    (tmp_path / file).write_text(said)
    assert "holds files of several splits" in refused(tmp_path)
    for path in names:
        assert files_of(str(tmp_path / path)) == [tmp_path / path]


@pytest.mark.parametrize("said", ["", "# Rows", "---\n: [\n---\n", "---\n3\n---\n", "---\nconfigs: 3\n---\n", "\xff"])
def test_a_card_that_says_nothing_disturbs_nobody(said: str, tmp_path: Path) -> None:
    fill(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "README.md").write_text(said, encoding="latin-1")
    (tmp_path / "dataset_infos.json").write_text(said, encoding="latin-1")
    assert len(files_of(str(tmp_path))) == 2
