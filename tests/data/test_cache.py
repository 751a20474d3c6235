"""The cache of prepared tokens: when it hits, why it misses, and that an entry is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from sft_lab.data import cache
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.runs import RunDirectory
from tests.data.preparing import config_of

KEY: cache.Key = {"places": ["a"], "contents": ["1"], "max_length": 8}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, but for the model."""
    own = tmp_path / "cache"
    shared = Path(os.environ["SFT_LAB_CACHE"])
    prepare(config_of(data="requests"))  # the model is there
    own.mkdir()
    (own / "models").symlink_to(shared / "models")
    monkeypatch.setenv("SFT_LAB_CACHE", str(own))
    return own / "data"


def build(folder: Path) -> None:
    (folder / "made").write_text("x")


def never(folder: Path) -> None:
    raise AssertionError("built again")


def test_the_second_call_hits(root: Path) -> None:
    entry, message = cache.get(KEY, build)
    assert message.startswith("cache miss (this data was not prepared before)")
    assert (entry / "made").read_text() == "x"
    again, message = cache.get(dict(reversed(KEY.items())), never)
    assert again == entry
    assert message.startswith("cache hit")


def test_a_miss_says_what_changed() -> None:
    cache.get(KEY, build)
    cache.get(KEY | {"contents": ["2"], "max_length": 9}, build)
    assert "(changed: max_length)" in cache.get(KEY | {"max_length": 7}, build)[1]
    assert "(not prepared before)" not in cache.get(KEY | {"new": 1}, build)[1]


def test_a_build_that_fails_leaves_nothing(root: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        cache.get(KEY, fail)
    assert [path.name for path in root.iterdir() if path.suffix != ".lock"] == []
    assert "miss" in cache.get(KEY, build)[1]


PROCESS = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path
    from sft_lab.data import cache

    def build(folder):
        (folder / "made").write_text("x")
        with open("builds", "a") as file:
            file.write("built\\n")
        if sys.argv[1] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1)

    print(cache.get({"places": ["a"]}, build)[1])
""")


def start(how: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROCESS, how], cwd=cwd, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_cleaned_up_by_the_next(root: Path, tmp_path: Path) -> None:
    assert start("die", tmp_path).wait() == -signal.SIGKILL
    assert list(root.glob(".*.tmp"))
    entry, message = cache.get({"places": ["a"]}, build)
    assert "miss" in message
    assert not list(root.glob(".*.tmp"))
    assert (entry / "key.json").is_file()


def test_processes_at_once_build_once(tmp_path: Path) -> None:
    processes = [start("live", tmp_path) for _ in range(3)]
    said = sorted(process.communicate()[0].split()[1] for process in processes)
    assert (tmp_path / "builds").read_text() == "built\n"
    assert said == ["hit,", "hit,", "miss"]


# ----------------------------------------------------------------------------------------------- what prepare makes


def rows(path: Path, word: str = "answer") -> Path:
    path.write_text("".join(json.dumps({"prompt": f"q {i}", "completion": f"{word} {i}"}) + "\n" for i in range(12)))
    return path


def made(path: Path, *overrides: str, **more: Any) -> str:
    return str(prepare(config_of(f"data.path={path}", *overrides, **more)).facts["cache"])


@pytest.mark.parametrize(
    "override",
    ["trainer.learning_rate=1", "seed=7", "data.seed=7", "trainer.packing=true", "trainer.per_device_train_batch_size=1",
     "peft.r=4", "trainer.max_steps=3", "data.num_proc=1", "data.metrics=[exact_match]"],
)  # fmt: skip
def test_what_changes_no_token_is_no_miss(tmp_path: Path, override: str) -> None:
    path = rows(tmp_path / "rows.jsonl")
    assert made(path).startswith("cache miss")
    assert made(path, override).startswith("cache hit")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("data.loss=all", "loss"),
        ("trainer.max_length=99", "max_length"),
        ("data.on_long_row=truncate", "on_long_row"),
        ("data.deduplicate=exact", "deduplicate"),
        ("chat_template.name=zephyr", "template"),
        ("data.train_rows=3", "train_rows"),
    ],
)
def test_what_changes_tokens_is_named(tmp_path: Path, override: str, named: str) -> None:
    path = rows(tmp_path / "rows.jsonl")
    made(path)
    message = made(path, override)
    assert message.startswith("cache miss (changed: ")
    assert named in message.split("changed: ")[1].split(")")[0].split(", ")


def test_the_seed_counts_where_rows_are_drawn(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl")
    made(path, "data.eval_rows=2")
    assert "(changed: seed)" in made(path, "data.eval_rows=2", "data.seed=7")


def test_a_changed_file_is_seen_whatever_its_size_and_time(tmp_path: Path) -> None:
    path = rows(tmp_path / "rows.jsonl")
    before = path.stat()
    made(path)
    rows(path, word="enswar")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert "(changed: contents)" in made(path)


def test_a_run_keeps_its_data_when_the_cache_goes(tmp_path: Path, root: Path) -> None:
    data = prepare(config_of(f"data.path={rows(tmp_path / 'rows.jsonl')}", "data.eval_rows=2"))
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    data.save(run)
    assert data.folder is not None
    assert (run.data / "train-0.arrow").stat().st_ino == (data.folder / "train-0.arrow").stat().st_ino  # costs no space
    expected = data.train.to_list(), data.eval.to_list()
    shutil.rmtree(root)
    loaded = Prepared.load(run)
    assert (loaded.train.to_list(), loaded.eval.to_list()) == expected
