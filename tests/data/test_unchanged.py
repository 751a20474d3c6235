"""A file that changes while it is prepared: refused, and nothing of it is kept in the cache."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from sft_lab.data import cache, sources
from sft_lab.data.files import digest, read_file
from sft_lab.data.prepare import prepare
from sft_lab.data.unchanged import Version
from sft_lab.errors import PreflightError
from sft_lab.schema import DataConfig
from tests.data.preparing import config_of, prepared_from, written

GOOD = [{"prompt": f"good {i}", "completion": "yes"} for i in range(8)]
EVIL = [{"prompt": f"evil {i}", "completion": "no."} for i in range(8)]
SAYS = "changed while it was read"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, but for the model."""
    shared = Path(os.environ["SFT_LAB_CACHE"])
    prepare(config_of(data="requests"))  # the model is there
    own = tmp_path / "cache"
    own.mkdir()
    (own / "models").symlink_to(shared / "models")
    monkeypatch.setenv("SFT_LAB_CACHE", str(own))
    return own / "data"


def replace(path: Path) -> None:
    os.replace(written(path.with_name("evil.jsonl"), EVIL), path)


def replace_and_put_back(path: Path) -> None:
    os.replace(path, path.with_name("kept.jsonl"))
    replace(path)
    os.replace(path.with_name("kept.jsonl"), path)


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write(json.dumps(EVIL[0]) + "\n")


def write_over(path: Path) -> None:
    """With the same size and time."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b"good", b"evil").replace(b"row", b"sow"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(path: Path) -> None:
    path.unlink()


CHANGES = [replace, replace_and_put_back, append, write_over, remove]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("overrides", "changed"),
    [((), "rows"), (("data.eval_rows=2",), "rows"), (("data.eval_path=FOLDER/other.jsonl",), "other")],
)
def test_no_entry_is_kept_of_a_file_that_changed_meanwhile(
    change: Callable[[Path], None],
    overrides: tuple[str, ...],
    changed: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = written(tmp_path / "rows.jsonl", GOOD)
    written(tmp_path / "other.jsonl", [{"prompt": "another", "completion": "row"}])
    get, victim = cache.get, tmp_path / f"{changed}.jsonl"
    contents = victim.read_bytes()

    def changed_once_it_is_known(key: cache.Key, build: Callable[[Path], None]) -> tuple[Path, str]:
        change(victim)
        return get(key, build)

    overrides = tuple(word.replace("FOLDER", str(tmp_path)) for word in overrides)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "get", changed_once_it_is_known)
        with pytest.raises(PreflightError, match=re.escape(f"{victim}: {SAYS}")) as error:
            prepared_from(path, *overrides)
    assert error.value.exit_code == 2
    assert not list(root.glob("*/key.json"))
    victim.write_bytes(contents)
    data = prepared_from(path, *overrides)
    assert data.facts["cache"].startswith("cache miss")
    assert b"evil" not in (data.folder / "train-0.arrow").read_bytes() if data.folder else False


@pytest.mark.parametrize("change", [append, replace])
def test_a_change_in_the_middle_of_reading_is_the_reason_for_what_goes_wrong_then(
    change: Callable[[Path], None], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "rows.jsonl", [*GOOD, "broken"])
    before = sources.Source.__iter__

    def rows(source: sources.Source) -> Any:
        for number, row in enumerate(before(source)):
            if number == 3:
                change(path)
            yield row

    monkeypatch.setattr(sources.Source, "__iter__", rows)
    with pytest.raises(PreflightError, match=SAYS):
        prepared_from(path)
    assert not list(root.glob("*/key.json"))


def write_jsonl(path: Path, rows: list[Any]) -> None:
    written(path, rows)


def write_gzip(path: Path, rows: list[Any]) -> None:
    path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode(), mtime=0))


def write_parquet(path: Path, rows: list[Any]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_arrow(path: Path, rows: list[Any]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_json(path: Path, rows: list[Any]) -> None:
    path.write_text(json.dumps(rows))


def write_csv(path: Path, rows: list[Any]) -> None:
    path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_jsonl),
        ("a.jsonl.gz", write_gzip),
        ("a.json", write_json),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
        ("a.arrow", write_arrow),
    ],
)
def test_every_kind_of_file_is_read_in_the_version_that_is_known(
    name: str, write: Callable[[Path, list[Any]], None], tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path, GOOD)
    _, version = digest(path)
    assert [value for _, value, _ in read_file(path, version)] == GOOD
    write(tmp_path / f"other-{name}", EVIL)
    os.replace(tmp_path / f"other-{name}", path)
    with pytest.raises(PreflightError, match=SAYS):
        next(read_file(path, version))
    assert version != Version.of(path)


def test_a_file_that_a_link_no_longer_leads_to_is_seen(tmp_path: Path) -> None:
    """The file itself does not change when a link to it is turned away and back."""
    good, evil, link = written(tmp_path / "g.jsonl", GOOD), written(tmp_path / "e.jsonl", EVIL), tmp_path / "rows.jsonl"
    link.symlink_to(good)
    _, version = digest(link)
    link.unlink()
    link.symlink_to(evil)
    with pytest.raises(PreflightError, match=SAYS):
        next(read_file(link, version))
    link.unlink()
    link.symlink_to(good)
    assert len(list(read_file(link, version))) == len(GOOD)


def test_a_local_data_set_of_the_hubs_kind_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` knows files by their time, and would find what it made of others again."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    (tmp_path / "set").mkdir()
    path = written(tmp_path / "set" / "train.jsonl", GOOD)
    load, data = datasets.load_dataset, DataConfig(source="hub", path=str(tmp_path / "set"))

    def while_it_changes(*args: Any, **options: Any) -> Any:
        os.replace(path, tmp_path / "kept.jsonl")
        os.replace(written(tmp_path / "evil.jsonl", EVIL), path)
        stat = (tmp_path / "kept.jsonl").stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        found = load(*args, **options)
        os.replace(tmp_path / "kept.jsonl", path)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", while_it_changes)
        with pytest.raises(PreflightError, match=SAYS):
            sources.training(data)
    (source,) = sources.training(data)
    assert [row.value for row in source] == GOOD
    assert isinstance(load(str(tmp_path / "set"), split="train"), Dataset)
