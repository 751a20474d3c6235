"""Where rows come from: places, samples of them, and what cannot be had. Reading a file is held by test_files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sft_lab.data import sources
from sft_lab.errors import PreflightError, RunError
from sft_lab.schema import DataConfig, SourceConfig


def write(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": f"{path.stem} {i}", "completion": "y"}) + "\n" for i in range(count)))
    return path


def numbers(source: sources.Source) -> list[int]:
    return [row.number for row in source]


def mixture(**configs: SourceConfig) -> list[sources.Source]:
    return sources.training(DataConfig(source="mixture", path="", sources=configs, seed=3))


def test_a_directory_and_a_glob_are_read_file_by_file(tmp_path: Path) -> None:
    files = [write(tmp_path / "rows" / name, 2) for name in ("b.jsonl", "a.jsonl")]
    for path in (tmp_path / "rows", tmp_path / "rows" / "*.jsonl"):
        (source,) = sources.training(DataConfig(path=str(path)))
        assert [place.name for place in source.places] == [str(file) for file in sorted(files)]
        assert [(row.place, row.number) for row in source] == [(0, 1), (0, 2), (1, 1), (1, 2)]


def test_a_place_is_known_by_its_contents(tmp_path: Path) -> None:
    one, same, other = (
        write(tmp_path / "x.jsonl", 2),
        write(tmp_path / "d" / "x.jsonl", 2),
        write(tmp_path / "y.jsonl", 2),
    )
    prints = [sources.training(DataConfig(path=str(file)))[0].places[0].fingerprint for file in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]


def test_a_sample_is_drawn_by_the_seed(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", 100))
    draw = [numbers(mixture(a=SourceConfig(path=path, sample=0.3, seed=seed))[0]) for seed in (1, 1, 2)]
    assert len(draw[0]) == 30
    assert draw[0] == draw[1] == sorted(draw[0])
    assert draw[2] != draw[0]


def test_a_source_without_a_seed_of_its_own_has_the_datas(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", 100))
    own, datas = (mixture(a=SourceConfig(path=path, sample=0.3, seed=seed))[0] for seed in (3, -1))
    assert numbers(own) == numbers(datas)


def test_max_rows_are_the_first_of_the_sample(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rows.jsonl", 100))
    all_, few = (mixture(a=SourceConfig(path=path, sample=0.3, max_rows=n))[0] for n in (-1, 5))
    assert numbers(few) == numbers(all_)[:5]
    assert few.count() == 5


def test_places_of_a_mixture_are_counted_on(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", 1) for name in "abc"]
    one, two = mixture(x=SourceConfig(path=str(tmp_path / "[ab].jsonl")), y=SourceConfig(path=str(files[2])))
    assert [row.place for source in (one, two) for row in source] == [0, 1, 2]


def test_held_out_rows_of_a_file_of_their_own(tmp_path: Path) -> None:
    data = DataConfig(path=str(write(tmp_path / "a.jsonl", 1)), eval_path=str(write(tmp_path / "b.jsonl", 2)))
    held_out = sources.held_out(data, first_place=1)
    assert held_out is not None
    assert [(row.place, row.number) for row in held_out] == [(1, 1), (1, 2)]
    assert sources.held_out(DataConfig(path=data.path), 1) is None


def test_requests_are_made_to_order() -> None:
    data = DataConfig(source="requests", path="", train_rows=5, eval_rows=2)
    (train,), held_out = sources.training(data), sources.held_out(data, 1)
    assert held_out is not None
    assert (train.count(), held_out.count()) == (5, 2)
    assert [train.places[0].name, held_out.places[0].name] == ["requests/train", "requests/eval"]


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=r"nowhere\.jsonl"):
        sources.training(DataConfig(path=str(tmp_path / "nowhere.jsonl")))


def test_a_sample_is_the_same_whatever_else_takes_part(tmp_path: Path) -> None:
    source = SourceConfig(path=str(write(tmp_path / "a.jsonl", 100)), sample=0.3)
    other = SourceConfig(path=str(write(tmp_path / "b.jsonl", 10)))
    assert numbers(mixture(a=source)[0]) == numbers(mixture(b=other, a=source)[1])


def test_a_stream_is_not_read_to_know_it(tmp_path: Path) -> None:
    """Its size and time stand for its contents: it may be larger than what can be read in an hour."""
    path = write(tmp_path / "rows.jsonl", 3)
    before = path.stat()
    place = sources.training(DataConfig(path=str(path), streaming=True))[0].places[0]
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert sources.training(DataConfig(path=str(path), streaming=True))[0].places[0].fingerprint == place.fingerprint
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert sources.training(DataConfig(path=str(path), streaming=True))[0].places[0].fingerprint != place.fingerprint


# ------------------------------------------------------------------------------------------------------------ the hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as the hub has it, in a directory of its own: `datasets` reads both in the same way."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read from the environment on import
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "set" / "train.jsonl", 5)
    write(tmp_path / "set" / "test.jsonl", 2)
    return tmp_path / "set"


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_the_hub(hub: Path, streaming: bool) -> None:
    data = DataConfig(source="hub", path=str(hub), eval_split="test", streaming=streaming)
    (source,), held_out = sources.training(data), sources.held_out(data, 1)
    assert held_out is not None
    assert [place.name for place in (*source.places, *held_out.places)] == [f"{hub}[train]", f"{hub}[test]"]
    assert [(row.place, row.number, row.value["prompt"]) for row in source] == [
        (0, n, f"train {n - 1}") for n in range(1, 6)
    ]
    assert [(row.place, row.number, row.value["prompt"]) for row in held_out] == [(1, 1, "test 0"), (1, 2, "test 1")]


def test_a_hub_data_set_is_known_by_its_contents(hub: Path) -> None:
    data = DataConfig(source="hub", path=str(hub))
    one, same = (sources.training(data)[0].places[0].fingerprint for _ in range(2))
    write(hub / "train.jsonl", 6)
    assert one == same != sources.training(data)[0].places[0].fingerprint


@pytest.mark.parametrize(
    ("path", "split", "says"),
    [("no/such_set", "train", "no/such_set"), ("{hub}", "dev", "dev")],
    ids=["no data set", "no split"],
)
def test_what_the_hub_has_not_fails_in_one_sentence(hub: Path, path: str, split: str, says: str) -> None:
    path = path.format(hub=hub)
    with pytest.raises(RunError, match=rf"^data\.path={path}: the hub gave no such data set \(.*{says}") as error:
        sources.training(DataConfig(source="hub", path=path, split=split))
    assert "\n" not in str(error.value)
