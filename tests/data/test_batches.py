"""In which order rows train and which share a batch, down to the batches that the model sees."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_lab.data.batches import TrainingRows, join, order, strategy
from sft_lab.data.prepared import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.schema import Config
from sft_lab.trainer import Collator, flattens
from tests.data.preparing import config_of, prepared_from, written
from tests.test_training import make

STRATEGIES = ("random", "group_by_length", "sequential")
SKEWED = np.clip(np.random.default_rng(0).lognormal(np.log(290), 0.8, 1003), 8, 1024).astype(int)
SIZE = 8


def batches_of(rows: np.ndarray, size: int = SIZE) -> list[np.ndarray]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def padding(lengths: np.ndarray, rows: np.ndarray) -> int:
    return sum(int((lengths[batch].max() - lengths[batch]).sum()) for batch in batches_of(rows))


# ---------------------------------------------------------------------------------------------------------- the order


@pytest.mark.parametrize("how", STRATEGIES)
@pytest.mark.parametrize("count", [0, 1, SIZE - 1, SIZE, SIZE + 1, 1003])
def test_an_epoch_has_every_row_once(how: str, count: int) -> None:
    for epoch in range(3):
        assert sorted(order(SKEWED[:count], how, SIZE, 42, epoch)) == list(range(count))


@pytest.mark.parametrize("how", ["random", "group_by_length"])
def test_seed_and_epoch_decide_the_order(how: str) -> None:
    first, again, epoch, seed = (
        order(SKEWED, how, SIZE, *drawn).tolist() for drawn in ((42, 0), (42, 0), (42, 1), (43, 0))
    )
    assert first == again
    assert len({tuple(first), tuple(epoch), tuple(seed), tuple(range(len(SKEWED)))}) == 4


def test_seeds_and_epochs_next_to_each_other_are_not_confused() -> None:
    """Seed 42 in its second epoch is not seed 43 in its first."""
    assert order(SKEWED, "random", SIZE, 42, 1).tolist() != order(SKEWED, "random", SIZE, 43, 0).tolist()


def test_sequential_is_as_the_rows_stand() -> None:
    assert order(SKEWED, "sequential", SIZE, 42, 3).tolist() == list(range(len(SKEWED)))


def test_batches_of_like_length_waste_a_fraction_of_the_padding() -> None:
    """Of 50 batches sorted together one spans a fiftieth of the lengths, where a random one spans nearly all."""
    random, grouped = (padding(SKEWED, order(SKEWED, how, SIZE, 42, 0)) for how in ("random", "group_by_length"))
    assert grouped < random / 8


def test_whole_batches_are_cut_from_the_sorted_lengths() -> None:
    """In one mega-batch no batch's lengths reach into another's, and what fills no batch stands at the end."""
    lengths = SKEWED[: 20 * SIZE + 3]
    *whole, last = batches_of(order(lengths, "group_by_length", SIZE, 42, 0))
    assert [len(batch) for batch in (*whole, last)] == [SIZE] * 20 + [3]
    ranges = sorted((int(lengths[batch].min()), int(lengths[batch].max())) for batch in whole)
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(ranges))


def test_long_and_short_batches_take_turns() -> None:
    """A step of several batches must not be all of one length, nor the epoch begin with the short ones.

    Of 125 batches in random order the rank correlation between place and length has a standard deviation of 1/sqrt(124) =
    0.09; 0.45 is five of them, and batches left sorted within their mega-batches come to 0.8 within one.
    """
    batches = batches_of(order(SKEWED, "group_by_length", SIZE, 42, 0))[:-1]
    means = np.array([SKEWED[batch].mean() for batch in batches])
    for part in (means, means[:50]):
        ranks = part.argsort().argsort()
        assert abs(np.corrcoef(ranks, np.arange(len(part)))[0, 1]) < 0.45


@pytest.mark.parametrize(
    ("asked", "packing", "used"),
    [
        ("auto", False, "group_by_length"),
        ("auto", True, "random"),
        *((how, packing, how) for how in STRATEGIES for packing in (False, True)),
    ],
)
def test_which_strategy_is_used(asked: str, packing: bool, used: str) -> None:
    assert strategy(config_of(f"trainer.train_sampling_strategy={asked}", f"trainer.packing={packing}")) == used


# ------------------------------------------------------------------------------------------------------ rows and packs

Rows = Callable[..., tuple[Config, Prepared, TrainingRows]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """Forty rows of very different lengths, as a trainer of these overrides draws them."""
    path = written(
        tmp_path_factory.mktemp("rows") / "rows.jsonl",
        [{"prompt": f"{i} " + "word " * (i % 7), "completion": "answer " * (1 + i % 5)} for i in range(40)],
    )

    def run(*overrides: str) -> tuple[Config, Prepared, TrainingRows]:
        given = ("trainer.max_length=64", "trainer.per_device_train_batch_size=6", *overrides)
        data = prepared_from(path, *given)
        config = config_of(*given)
        return config, data, TrainingRows(data.train, data.column("length"), config)

    return run


@pytest.mark.parametrize("how", STRATEGIES)
def test_items_are_the_rows_in_the_order_of_the_epoch(rows: Rows, how: str) -> None:
    config, data, drawn = rows(f"trainer.train_sampling_strategy={how}")
    assert len(drawn) == 40
    for epoch in (0, 1):
        drawn.set_epoch(epoch)
        expected = order(data.column("length"), how, 6, config.seed, epoch)
        items = [drawn[i] for i in range(40)]
        assert items == [{name: data.train[int(row)][name] for name in ("input_ids", "labels")} for row in expected]
        assert [len(item["input_ids"]) for item in items] == drawn.lengths[drawn.order].tolist()


def test_micro_batches_are_consecutive_items(rows: Rows) -> None:
    _, _, drawn = rows()
    drawn.set_epoch(2)
    batches = list(drawn.micro_batches())
    assert [len(batch) for batch in batches] == [6] * 6 + [4]
    assert np.concatenate(batches).tolist() == drawn.order.tolist()


@pytest.mark.parametrize("how", STRATEGIES)
def test_packed_items_are_whole_rows_joined(rows: Rows, how: str) -> None:
    """Nothing of a row is lost, and what stands first in it learns nothing from the row before."""
    _, data, drawn = rows("trainer.packing=true", f"trainer.train_sampling_strategy={how}")
    assert len(drawn) < len(data.train)
    documents = []
    for item in (drawn[i] for i in range(len(drawn))):
        assert len(item["input_ids"]) == len(item["labels"]) == sum(item["seq_lengths"]) <= 64
        ends = np.cumsum(item["seq_lengths"])
        for end, length in zip(ends, item["seq_lengths"], strict=True):
            documents.append((item["input_ids"][end - length : end], item["labels"][end - length : end]))
    assert sorted(documents) == sorted((row["input_ids"], row["labels"]) for row in data.train)
    assert all(labels[0] == IGNORE for _, labels in documents)


def test_packs_stay_the_same_from_epoch_to_epoch(rows: Rows) -> None:
    """So that every step's number of tokens is known before training; the order of the packs changes."""
    _, _, drawn = rows("trainer.packing=true")
    epochs = []
    for epoch in (0, 1):
        drawn.set_epoch(epoch)
        epochs.append([drawn[i]["input_ids"] for i in range(len(drawn))])
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1])


def test_joined_documents() -> None:
    joined = join({"input_ids": [[1, 2], [3]], "labels": [[IGNORE, 2], [IGNORE]]})
    assert joined == {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, IGNORE], "seq_lengths": [2, 1]}


# ------------------------------------------------------------------------------------------------ what the model sees


def watch(trainer: Any) -> list[list[list[int]]]:
    """The input_ids of every forward from now on."""
    seen: list[list[list[int]]] = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    return seen


def expected_batches(config: Config, data: Prepared, epochs: int) -> list[list[list[int]]]:
    rows = TrainingRows(data.train, data.column("length"), config)
    collator, size = Collator(data.tokenizer.pad_token_id, flattens(config)), config.trainer.per_device_train_batch_size
    batches = []
    for epoch in range(epochs):
        rows.set_epoch(epoch)
        items = [rows[i] for i in range(len(rows))]
        batches += [collator(items[start : start + size])["input_ids"].tolist() for start in range(0, len(items), size)]
    return batches


@pytest.mark.parametrize(
    "overrides",
    [[], ["trainer.packing=true", "trainer.max_length=128"], ["trainer.train_sampling_strategy=sequential"]],
    ids=["by length", "packed", "sequential"],
)
def test_training_draws_the_batches_that_were_planned(tmp_path: Path, overrides: list[str]) -> None:
    """In both epochs; what `plan` counts is then what is computed."""
    sizes = ["trainer.per_device_train_batch_size=3", "trainer.num_train_epochs=2", "trainer.max_steps=-1"]
    config, data, trainer = make([*overrides, *sizes], tmp_path)
    seen = watch(trainer)
    trainer.train()
    batches = expected_batches(config, data, epochs=2)
    assert seen == batches
    first, second = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    assert (first == second) == ("trainer.train_sampling_strategy=sequential" in overrides)


def test_a_resumed_run_goes_on_with_the_batches_that_were_next(tmp_path: Path) -> None:
    """From within the first epoch of four steps, from its end, and from within the second."""
    overrides = ["trainer.per_device_train_batch_size=4", "trainer.max_steps=8", "trainer.save_steps=2"]
    overrides.append("trainer.save_total_limit=8")
    config, data, trainer = make(overrides, tmp_path)
    trainer.train()
    _, _, resumed = make(overrides, tmp_path)
    seen = watch(resumed)
    for step in (2, 4, 6):
        seen.clear()
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"checkpoint-{step}"))
        assert seen == expected_batches(config, data, epochs=2)[step:]
