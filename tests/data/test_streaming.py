"""Rows made into tokens as training goes."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest

from sft_lab import trainer as trainers
from sft_lab.data import streaming
from sft_lab.data.prepare import prepare
from sft_lab.errors import RunError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config
from tests.data.preparing import config_of, written
from tests.data.test_batches import watch

ROWS = [{"prompt": f"q {i}", "completion": f"answer {i} " * (1 + i % 9)} for i in range(50)]
BAD = 30  # behind what is looked at before training, see the fixture


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_lab.data.prepare._STREAM_SAMPLE", 20)
    monkeypatch.setattr(streaming, "_WINDOW", 16)


def config(path: Path, *overrides: str) -> Config:
    settings = ["data.streaming=true", "trainer.max_steps=4", "data.shuffle_buffer=10", "trainer.max_length=128"]
    return config_of(f"data.path={path}", *settings, *overrides)


def drawn(config: Config, epoch: int = 0) -> list[list[int]]:
    rows = streaming.training_rows(config, prepare(config))
    rows.set_epoch(epoch)
    return [row["input_ids"] for row in rows]


def test_a_sequential_stream_is_what_would_have_been_prepared(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    whole = prepare(config_of(f"data.path={path}", "trainer.max_length=128"))
    assert drawn(config(path, "trainer.train_sampling_strategy=sequential")) == whole.train["input_ids"][:]


def test_its_order_is_the_seeds_and_the_epochs(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    one, again, later, other = (
        drawn(config(path)),
        drawn(config(path)),
        drawn(config(path), 1),
        drawn(config(path, "seed=7")),
    )
    assert one == again
    assert one != later
    assert one != other
    assert sorted(one) == sorted(later) == sorted(other)


def test_a_second_pass_from_the_start_is_the_first_again(tmp_path: Path) -> None:
    """A resumed run reads the stream from its start and passes over what was trained."""
    settings = config(written(tmp_path / "rows.jsonl", ROWS))
    rows = streaming.training_rows(settings, prepare(settings))
    one, two = ([row["input_ids"] for row in rows] for _ in range(2))
    assert one == two


def test_a_stream_is_packed(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    settings = config(path, "trainer.packing=true")
    packed = list(streaming.training_rows(settings, prepare(settings)))
    documents = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == sum(row["seq_lengths"]) <= 128
        ends = itertools.accumulate(row["seq_lengths"])
        documents += [row["input_ids"][end - n : end] for end, n in zip(ends, row["seq_lengths"], strict=True)]
    assert sorted(documents) == sorted(drawn(config(path)))
    assert len(packed) < len(documents)


def test_only_its_beginning_is_looked_at_before(tmp_path: Path) -> None:
    """And is read no further: the bad row behind it is no reason to refuse."""
    data = prepare(config(written(tmp_path / "rows.jsonl", [*ROWS[:BAD], {"prompt": "no answer"}, *ROWS[BAD:]])))
    assert data.facts["rows"]["read"] == 20


def test_a_bad_row_ends_the_run_when_its_turn_comes(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", [*ROWS[:BAD], {"prompt": "no answer"}, *ROWS[BAD:]])
    with pytest.raises(RunError, match=rf"rows\.jsonl: row {BAD + 1}: .*data\.on_bad_row=skip"):
        drawn(config(path))


def test_a_bad_row_is_left_out_on_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "rows.jsonl", [*ROWS[:BAD], {"prompt": "no answer"}, *ROWS[BAD:]])
    with caplog.at_level(logging.WARNING, logger="sft_lab"):
        assert len(drawn(config(path, "data.on_bad_row=skip"))) == len(ROWS)
    assert f"rows.jsonl: row {BAD + 1}: " in caplog.text


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_long_row_ends_the_run_where_that_was_asked_for(tmp_path: Path, on_bad_row: str) -> None:
    path = written(tmp_path / "rows.jsonl", [*ROWS[:BAD], {"prompt": "long", "completion": "word " * 200}])
    settings = config(path, "data.on_long_row=error", f"data.on_bad_row={on_bad_row}")
    with pytest.raises(RunError, match=rf"rows\.jsonl: row {BAD + 1}: \d+ tokens, more than trainer\.max_length=128$"):
        drawn(settings)


def test_what_is_left_out_of_a_stream_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left_out = [{"prompt": "long", "completion": "word " * 200}, {"prompt": "q", "completion": "a", "weight": 0}]
    path = written(tmp_path / "rows.jsonl", [*ROWS[:BAD], *left_out])
    with caplog.at_level(logging.INFO, logger="sft_lab"):
        assert len(drawn(config(path))) == BAD
    assert f"left out (long) {path}:{BAD + 1}" in caplog.text
    assert f"left out (weight_0) {path}:{BAD + 2}" in caplog.text


def test_a_row_of_a_stream_that_gives_a_held_out_row_away(tmp_path: Path) -> None:
    """It lies behind what is looked at before training, so it ends the run or is left out when its turn comes."""
    held_out = written(tmp_path / "eval.jsonl", [{"prompt": "secret", "completion": "of the test"}])
    path = written(tmp_path / "rows.jsonl", [*ROWS[:BAD], {"prompt": "Secret", "completion": "of the  test"}])
    given = [f"data.eval_path={held_out}"]
    with pytest.raises(RunError, match=rf"rows\.jsonl: row {BAD + 1}: gives away .*data\.on_leak=drop"):
        drawn(config(path, *given))
    assert len(drawn(config(path, *given, "data.on_leak=drop"))) == BAD
    assert len(drawn(config(path, *given, "preflight.allow=[leak]"))) == BAD + 1


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_model_trains_on_it(tmp_path: Path, packing: str) -> None:
    """On its rows, in its order, and on those of the next epoch where max_steps reaches beyond its end."""
    path = written(tmp_path / "rows.jsonl", ROWS)
    sizes = ["trainer.per_device_train_batch_size=4", "trainer.max_steps=16"]
    settings = config(path, f"trainer.packing={packing}", *sizes)
    data = prepare(settings)
    trainer = trainers.build(settings, RunDirectory(tmp_path / "run"), data, [])
    seen = watch(trainer)
    trainer.train()
    assert trainer.state.global_step == len(seen) == 16
    collator = trainers.Collator(data.tokenizer.pad_token_id, trainers.flattens(settings))
    expected = []
    for epoch in range(3):
        rows = streaming.training_rows(settings, data)
        rows.set_epoch(epoch)
        items = list(rows)
        batches = [items[start : start + 4] for start in range(0, len(items), 4)]
        expected += [collator(batch)["input_ids"].tolist() for batch in batches]
    assert len(batches) < 16 < len(expected)
    assert seen == expected[:16]
