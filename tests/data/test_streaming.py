"""Rows made into tokens as training goes."""

from __future__ import annotations

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


def test_a_stream_is_packed(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    packed = drawn(config(path, "trainer.packing=true"))
    plain = drawn(config(path))
    assert sum(map(len, packed)) == sum(map(len, plain))
    assert len(packed) < len(plain)
    assert max(map(len, packed)) <= 128


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


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_model_trains_on_it(tmp_path: Path, packing: str) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    settings = config(path, f"trainer.packing={packing}", "trainer.per_device_train_batch_size=2")
    trainer = trainers.build(settings, RunDirectory(tmp_path / "run"), prepare(settings), [])
    trainer.train()
    assert trainer.state.global_step == 4
