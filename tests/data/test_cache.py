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
from transformers import AutoTokenizer

from sft_lab import embedded
from sft_lab.data import cache
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.errors import PreflightError
from sft_lab.runs import RunDirectory
from tests.data.preparing import config_of, written

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


def entries(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.suffix != ".lock" and not path.name.startswith(".")]


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
    """Against the entry of the same files that is most like it."""
    cache.get(KEY, build)
    cache.get(KEY | {"contents": ["2"], "max_length": 9}, build)
    assert "(changed: max_length)" in cache.get(KEY | {"max_length": 7}, build)[1]
    assert "(changed: contents, max_length)" in cache.get(KEY | {"contents": ["3"], "max_length": 6}, build)[1]
    assert "(changed: new)" in cache.get(KEY | {"new": 1}, build)[1]
    assert "(this data was not prepared before)" in cache.get(KEY | {"places": ["b"]}, build)[1]


def test_an_entry_is_not_seen_before_it_is_whole(root: Path) -> None:
    def look(folder: Path) -> None:
        build(folder)
        assert entries(root) == []

    entry, _ = cache.get(KEY, look)
    assert entries(root) == [entry]
    assert {path.name for path in entry.iterdir()} == {"made", "key.json"}


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
        ends = time.monotonic() + 60
        while len(list(Path().glob("asking-*"))) < 3 and time.monotonic() < ends:  # until all of them want it
            time.sleep(0.01)
        time.sleep(0.2)

    Path(f"asking-{os.getpid()}").touch()
    print(cache.get({"places": ["a"]}, build)[1])
""")


def start(how: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", PROCESS, how], cwd=cwd, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_cleaned_up_by_the_next(root: Path, tmp_path: Path) -> None:
    assert start("die", tmp_path).wait() == -signal.SIGKILL
    assert list(root.glob(".*.tmp"))
    assert entries(root) == []
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
     "peft.r=4", "trainer.max_steps=3", "data.num_proc=1", "data.metrics=[exact_match]", "model.dtype=bfloat16",
     "trainer.train_sampling_strategy=random", "data.shuffle_buffer=5", "evaluation.rows=3", "tracking.project=x"],
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
        ("data.truncation_side=left", "truncation_side"),
        ("data.on_bad_row=skip", "on_bad_row"),
        ("data.on_leak=drop", "on_leak"),
        ("data.deduplicate=exact", "deduplicate"),
        ("data.format=prompt_completion", "format"),
        ("data.columns={prompt: completion}", "format"),
        ("chat_template.name=zephyr", "template"),
        ("data.train_rows=3", "train_rows"),
        ("data.eval_rows=1", "eval_rows"),  # and no word of the seed, which nothing had asked for before
        ("data.streaming=true", "streaming"),  # nor of its contents, of which nothing is known then
    ],
)
def test_what_changes_tokens_is_named(tmp_path: Path, override: str, named: str) -> None:
    path = rows(tmp_path / "rows.jsonl")
    made(path)
    assert f"cache miss (changed: {named})" in made(path, override)


def test_a_changed_tokenizer_is_seen(tmp_path: Path) -> None:
    """In the same directory, under the same name: one more token cuts texts in another way."""
    path, model = rows(tmp_path / "rows.jsonl"), tmp_path / "model"
    shutil.copytree(embedded.resolve("embedded:tiny_llama"), model)
    made(path, f"model.path={model}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["answer"])
    tokenizer.save_pretrained(model)
    assert "(changed: tokenizer)" in made(path, f"model.path={model}")


def test_a_changed_template_is_seen(tmp_path: Path) -> None:
    """Under the same name, which is all that the config says of it."""
    path, jinja = rows(tmp_path / "rows.jsonl"), tmp_path / "own.jinja"
    given = ["chat_template.name=file", f"chat_template.path={jinja}"]
    jinja.write_text(embedded.CHATML)
    made(path, *given)
    jinja.write_text(embedded.CHATML.replace("<|im_start|>", "<|im_start|> "))
    assert "(changed: template)" in made(path, *given)


def test_a_new_version_prepares_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rows(tmp_path / "rows.jsonl")
    made(path)
    monkeypatch.setattr("sft_lab.data.prepare.version", lambda name: "next")
    assert "(changed: code)" in made(path)


def test_a_failed_preparation_is_no_entry(tmp_path: Path, root: Path) -> None:
    path, before = rows(tmp_path / "rows.jsonl"), entries(root) if root.exists() else []
    path.write_text(path.read_text() + "{}\n")
    for _ in range(2):
        with pytest.raises(PreflightError, match="row 13"):
            made(path)
    assert entries(root) == before
    assert made(rows(path)).startswith("cache miss (this data was not prepared before)")


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


def test_a_file_that_moves_to_the_held_out_side_is_seen(tmp_path: Path) -> None:
    """The same files in the same order, another border between them: the second was trained on and is no more."""
    for i in range(1, 4):
        written(tmp_path / f"{i}.jsonl", [{"prompt": f"q {i} {n}", "completion": f"answer {i} {n}"} for n in range(3)])
    made = [
        prepare(config_of(f"data.path={tmp_path}/{train}", f"data.eval_path={tmp_path}/{held_out}"))
        for train, held_out in (("[12].jsonl", "3.jsonl"), ("1.jsonl", "[23].jsonl"))
    ]
    assert [(len(data.train), len(data.eval)) for data in made] == [(6, 3), (3, 6)]
