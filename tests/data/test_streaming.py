"""Rows made into tokens as training goes."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from sft_lab import trainer as trainers
from sft_lab.data import sources, streaming
from sft_lab.data.prepare import prepare
from sft_lab.errors import RunError, SftLabError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config
from tests.data.preparing import config_of, written
from tests.data.test_batches import watch

ROWS = [{"prompt": f"q {i}", "completion": f"answer {i} " * (1 + i % 9)} for i in range(50)]
BAD = 30  # behind what is looked at before training, see the fixture


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_lab.data.selection._STREAM_SAMPLE", 20)
    monkeypatch.setattr(streaming, "_WINDOW", 16)


def config(path: Path, *overrides: str) -> Config:
    settings = ["data.streaming=true", "trainer.max_steps=4", "data.shuffle_buffer=10", "trainer.max_length=128"]
    return config_of(f"data.path={path}", *settings, *overrides)


def drawn(config: Config, number: int = 0) -> list[list[int]]:
    """The tokens of one pass."""
    return [row["input_ids"] for row in streaming.one_pass(config, prepare(config), number)]


def test_a_sequential_stream_is_what_would_have_been_prepared(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    whole = prepare(config_of(f"data.path={path}", "trainer.max_length=128"))
    assert drawn(config(path, "trainer.train_sampling_strategy=sequential")) == whole.train["input_ids"][:]


def test_its_order_is_the_seeds_and_the_passes(tmp_path: Path) -> None:
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


def test_pass_follows_on_pass_the_same_from_every_start(tmp_path: Path) -> None:
    """A resumed run reads the stream from its start and passes over what was trained."""
    settings = config(written(tmp_path / "rows.jsonl", ROWS))
    rows = streaming.training_rows(settings, prepare(settings))
    for _ in range(2):
        read = [row["input_ids"] for row in itertools.islice(rows, 3 * len(ROWS))]
        assert read == [*drawn(settings), *drawn(settings, 1), *drawn(settings, 2)]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_order_does_not_depend_on_the_workers(tmp_path: Path, workers: int) -> None:
    settings = config(written(tmp_path / "rows.jsonl", ROWS))
    rows = streaming.training_rows(settings, prepare(settings))
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=workers)
    assert [row["input_ids"] for row in itertools.islice(loader, 2 * len(ROWS))] == [
        *drawn(settings),
        *drawn(settings, 1),
    ]


def test_rows_left_out_are_told_once_and_a_few_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(
        tmp_path / "rows.jsonl", [*ROWS, *({"prompt": f"{i}", "completion": "word " * 300} for i in range(40))]
    )
    settings = config(path)
    rows = streaming.training_rows(settings, prepare(settings))
    with caplog.at_level(logging.INFO, logger="sft_lab"):
        list(itertools.islice(rows, 3 * len(ROWS)))
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    counts = [
        message.count("rows.jsonl:") + int(message.partition(" and ")[2].partition(" ")[0] or 0) for message in told
    ]
    assert sum(counts) == 40
    assert all(message.count("rows.jsonl:") <= 5 for message in told)


def test_a_stream_of_nothing_ends(tmp_path: Path) -> None:
    """A file that another one replaced after it was looked at."""
    path = written(tmp_path / "rows.jsonl", ROWS)
    settings = config(path)
    rows = streaming.training_rows(settings, prepare(settings))
    written(path, [{**row, "weight": 0} for row in ROWS])
    with pytest.raises(RunError, match=r"rows\.jsonl: no row of it is left to train on"):
        list(rows)


def test_a_stream_is_packed(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    settings = config(path, "trainer.packing=true")
    packed = list(streaming.one_pass(settings, prepare(settings), 0))
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
    """On its rows, in its order, and on those of the next pass where max_steps reaches beyond its end."""
    path = written(tmp_path / "rows.jsonl", ROWS)
    sizes = ["trainer.per_device_train_batch_size=4", "trainer.max_steps=16"]
    settings = config(path, f"trainer.packing={packing}", *sizes)
    data = prepare(settings)
    trainer = trainers.build(settings, RunDirectory(tmp_path / "run"), data, [])
    seen = watch(trainer)
    trainer.train()
    assert trainer.state.global_step == len(seen) == 16
    collator = trainers.Collator(data.tokenizer.pad_token_id, trainers.flattens(settings))
    passes = [list(streaming.one_pass(settings, data, number)) for number in range(8)]
    assert len(passes[0]) < 16 * 4
    rows = list(itertools.chain(*passes))[: 16 * 4]
    assert seen == [collator(rows[start : start + 4])["input_ids"].tolist() for start in range(0, len(rows), 4)]


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_in_a_later_pass_it_is_as_if_never_stopped(tmp_path: Path, accumulation: int, workers: int) -> None:
    """Passes of 4.25 steps; stopped after step 7, in the second, and gone on with to step 12, in the third."""
    path = written(tmp_path / "rows.jsonl", ROWS[:17])
    sizes = [
        f"trainer.per_device_train_batch_size={4 // accumulation}",
        "trainer.max_steps=12",
        "peft.lora_dropout=0.1",
    ]
    sizes.append(f"trainer.gradient_accumulation_steps={accumulation}")
    data = prepare(config(path, *sizes))

    def train(name: str, stop: int = 0, checkpoint: str | None = None) -> tuple[list[Any], dict[str, torch.Tensor]]:
        count = workers if checkpoint else 0  # which may change on the way
        settings = config(path, *sizes, f"trainer.dataloader_num_workers={count}")
        trainer = trainers.build(settings, RunDirectory(tmp_path / name), data, [StopAt(stop)])
        seen = watch(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        return seen, {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    straight, expected = train("straight")
    before, _ = train("stopped", stop=7)
    after, weights = train("stopped", checkpoint=str(tmp_path / "stopped" / "checkpoints" / "checkpoint-7"))
    assert (len(before), len(after)) == (7 * accumulation, 5 * accumulation)
    assert before + after == straight
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", ["append", "replace"])
@pytest.mark.parametrize("after", [10, len(ROWS) - 1])
def test_a_file_that_changes_while_it_streams_stops_the_run(change: str, after: int, tmp_path: Path) -> None:
    """The rows of a pass, and of one pass and the next, are those that the run began with."""
    path = written(tmp_path / "rows.jsonl", ROWS)
    settings = config(path, "trainer.train_sampling_strategy=sequential")
    rows = iter(streaming.training_rows(settings, prepare(settings)))
    for _ in range(after):
        next(rows)
    if change == "append":
        with path.open("a") as file:
            file.write('{"prompt": "more", "completion": "rows"}\n')
    else:
        written(tmp_path / "other.jsonl", ROWS[::-1]).replace(path)
    with pytest.raises(SftLabError, match=r"rows\.jsonl: changed while"):
        list(itertools.islice(rows, 2 * len(ROWS)))


def test_a_file_that_changes_between_two_passes_stops_the_run(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", ROWS)
    settings = config(path, "trainer.train_sampling_strategy=sequential")
    source = sources.training(settings.data)[0]
    known = streaming._fingerprints(source)
    written(path, ROWS[1:])
    data = prepare(settings)
    with pytest.raises(RunError, match="changed while the run reads it"):
        next(streaming._rows(settings, streaming._converter(settings, data), known))
