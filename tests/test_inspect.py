"""`inspect`: rows as they train, found by name, length or number, before a run and after it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sft_lab import config as configs
from sft_lab import trainer as trainers
from sft_lab.__main__ import main
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.runs import RunDirectory
from tests.conftest import Cli

ROWS = [{"prompt": f"what is {i}? " * (1 + i * 3 % 5), "completion": f"it is {i * 7919}"} for i in range(12)]
WORDS = ["model=tiny_llama", "tracking=none", "data=from_file", "data.path=rows.jsonl"]
PACKED = ["trainer.packing=true", "trainer.max_length=128"]
LONG = {"prompt": "short", "completion": "word " * 200}
Capture = pytest.CaptureFixture[str]


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with rows.jsonl in it."""
    write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys: Capture, *words: str, of: list[str] = WORDS) -> dict[str, Any]:
    """What --json prints."""
    assert main(["inspect", *of, *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def ids(document: dict[str, Any]) -> list[str]:
    return [row["id"] for row in document["rows"]]


def tokens(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    return [token["id"] for token in row["tokens"]], [token["label"] for token in row["tokens"]]


def documents(shown: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each document; a packed row has several."""
    found = []
    for row in shown["rows"]:
        row_ids, labels = tokens(row)
        start = 0
        for part in row["documents"]:
            end = start + part["tokens"]
            found.append((row_ids[start:end], labels[start:end]))
            start = end
        assert start == len(row_ids)
    return found


def refused(capsys: Capture, *words: str) -> str:
    """What was said of a user's mistake."""
    capsys.readouterr()
    try:
        code = main(["inspect", *words])
    except SystemExit as stop:  # argparse's
        code = int(str(stop.code))
    told = capsys.readouterr()
    assert (code, told.out) == (2, "")
    return told.err


# ------------------------------------------------------------------------------------------------------- which rows


def test_the_first_rows_are_shown(folder: Path, capsys: Capture) -> None:
    assert ids(shown(capsys)) == [f"rows.jsonl:{n}" for n in (1, 2, 3)]
    assert ids(shown(capsys, "--rows", "5")) == [f"rows.jsonl:{n}" for n in range(1, 6)]
    assert ids(shown(capsys, "--rows", "99")) == [f"rows.jsonl:{n}" for n in range(1, 13)]


@pytest.mark.parametrize("name", ["7", "rows.jsonl:7", "data/rows.jsonl:7", "FOLDER/data/rows.jsonl:7"])
def test_a_row_is_found_by_its_name(name: str, folder: Path, capsys: Capture) -> None:
    (folder / "data").mkdir()
    write(folder / "data" / "rows.jsonl", ROWS)
    row = name.replace("FOLDER", str(folder))
    document = shown(capsys, f"data.path={folder}/data", "--row", row)
    assert ids(document) == [f"{folder}/data/rows.jsonl:7"]
    assert "what is 6?" in "".join(token["text"] for token in document["rows"][0]["tokens"])


def test_of_several_files_a_number_is_a_row_of_each_and_a_name_of_one(folder: Path, capsys: Capture) -> None:
    (folder / "data").mkdir()
    for name in ("a.jsonl", "ba.jsonl"):
        write(folder / "data" / name, [{**ROWS[0], "completion": name}, {**ROWS[1], "completion": name}])
    words = [f"data.path={folder}/data"]
    assert ids(shown(capsys, *words, "--row", "2")) == [f"{folder}/data/{name}:2" for name in ("a.jsonl", "ba.jsonl")]
    assert ids(shown(capsys, *words, "--row", "a.jsonl:2")) == [f"{folder}/data/a.jsonl:2"]


def test_parts_of_a_row_that_was_split_are_found_together_and_alone(folder: Path, capsys: Capture) -> None:
    write(folder / "rows.jsonl", [ROWS[0], {"text": "word " * 100}])
    words = ["trainer.max_length=64", "data.on_long_row=split"]
    parts = ids(shown(capsys, *words, "--row", "2"))
    assert len(parts) > 2
    assert parts == [f"rows.jsonl:2#{n}" for n in range(1, len(parts) + 1)]
    assert ids(shown(capsys, *words, "--row", "rows.jsonl:2#2")) == ["rows.jsonl:2#2"]
    assert shown(capsys, *words)["left_out"] == {"split": ["rows.jsonl:2"]}


@pytest.mark.parametrize(("flag", "reverse"), [("--longest", True), ("--shortest", False)])
def test_rows_by_length(flag: str, reverse: bool, folder: Path, capsys: Capture) -> None:
    every = {row["id"]: len(row["tokens"]) for row in shown(capsys, "--rows", "99")["rows"]}
    rows = shown(capsys, flag, "--rows", "4")["rows"]
    assert [len(row["tokens"]) for row in rows] == sorted(every.values(), reverse=reverse)[:4]
    assert all(len(row["tokens"]) == every[row["id"]] for row in rows)


# ---------------------------------------------------------------------------------------------- rows that do not train

# A row's number, the overrides under which it does not train, and what is said of it.
LEFT_OUT = {
    "bad": ("2", ["data.on_bad_row=skip"], "it was left out (bad: columns prompt fit no format"),
    "long": ("3", ["trainer.max_length=64", "data.on_bad_row=skip"], "it was left out (long)"),
    "weight": ("4", ["data.on_bad_row=skip"], "it was left out (weight_0)"),
    "duplicate": ("5", ["data.deduplicate=exact", "data.on_bad_row=skip"], "it was left out (duplicate)"),
    "leak": ("6", ["data.eval_path=eval.jsonl", "data.on_leak=drop", "data.on_bad_row=skip"], "it was left out (leak)"),
    "held out": ("eval.jsonl:1", ["data.eval_path=eval.jsonl", "data.on_leak=drop", "data.on_bad_row=skip"], "it is held out"),
    "held out and bad": (
        "eval.jsonl:2",
        ["data.eval_path=eval.jsonl", "data.on_leak=drop", "data.on_bad_row=skip"],
        "it was held out and left out (bad: columns x fit no format",
    ),
    "never there": ("99", ["data.on_bad_row=skip"], "no such row trains (a row's name is like rows.jsonl:1)"),
    "another file": ("other.jsonl:1", ["data.on_bad_row=skip"], "(a row's name is like rows.jsonl:1)"),
    "end of a name": ("ows.jsonl:1", ["data.on_bad_row=skip"], "(a row's name is like rows.jsonl:1)"),
    "another part": ("1#2", ["data.on_bad_row=skip"], "(a row's name is like rows.jsonl:1)"),
    "a huge number": (f"{10**30}", ["data.on_bad_row=skip"], "(a row's name is like rows.jsonl:1)"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_of_a_row_that_does_not_train_it_is_said_why(name: str, folder: Path, capsys: Capture) -> None:
    row, overrides, said = LEFT_OUT[name]
    odd = [{"prompt": "a"}, LONG, {**ROWS[1], "weight": 0}, ROWS[0], ROWS[2]]
    write(folder / "rows.jsonl", [ROWS[0], *odd, ROWS[3]])
    write(folder / "eval.jsonl", [ROWS[2], {"x": 1}])
    told = refused(capsys, *WORDS, *overrides, "--row", row)
    assert told.startswith(f"sft_lab: --row={row} : no such row trains")
    assert said in told


def test_rows_held_out_of_the_same_file_are_said_to_be(folder: Path, capsys: Capture) -> None:
    words = ["data.eval_rows=4"]
    trained = ids(shown(capsys, *words, "--rows", "99"))
    held_out = [n for n in range(1, 13) if f"rows.jsonl:{n}" not in trained]
    assert len(held_out) == 4
    assert "it is held out" in refused(capsys, *WORDS, *words, "--row", str(held_out[0]))


def test_what_was_left_out_is_listed_with_reasons(folder: Path, capsys: Capture) -> None:
    write(
        folder / "rows.jsonl", [ROWS[0], {"prompt": "a"}, LONG, *({"text": f"t {i}", "weight": 0} for i in range(25))]
    )
    words = ["data.on_bad_row=skip", "trainer.max_length=64"]
    assert shown(capsys, *words)["left_out"] == {
        "bad": ["rows.jsonl:2"],
        "long": ["rows.jsonl:3"],
        "weight_0": [f"rows.jsonl:{n}" for n in range(4, 29)],
    }
    assert main(["inspect", *WORDS, *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "long: 1 rows: rows.jsonl:3" in lines
    assert any(line.startswith("weight_0: 25 rows: rows.jsonl:4, ") and line.endswith(", and 5 more") for line in lines)
    assert any(line.startswith("  rows.jsonl:2: columns prompt fit no format") for line in lines)


# ----------------------------------------------------------------------------------------------------------- as JSON


def test_json_has_what_scripts_read(folder: Path, capsys: Capture) -> None:
    talk = [("system", "be kind"), ("user", "hi"), ("assistant", "one"), ("user", "and?"), ("assistant", "two 🙂")]
    messages: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in talk]
    messages[2]["weight"] = 0
    write(folder / "rows.jsonl", [{"messages": messages}])
    document = shown(capsys)
    assert set(document) == {"rows", "left_out"}
    (row,) = document["rows"]
    assert set(row) >= {"id", "source", "tokens", "turns", "learned"}
    assert (row["id"], row["source"]) == ("rows.jsonl:1", "rows.jsonl")
    assert all(set(token) >= {"id", "text", "label"} for token in row["tokens"])
    assert all(token["label"] in (IGNORE, token["id"]) for token in row["tokens"])
    assert [(turn["role"], turn["trained"]) for turn in row["turns"]] == [
        (role, content == "two 🙂") for role, content in talk
    ]
    learned = [token["text"] for token in row["tokens"] if token["label"] != IGNORE]
    assert "".join(learned) == "two 🙂<|im_end|>"
    assert row["learned"] == len(learned)
    whole = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in talk)
    assert "".join(token["text"] for token in row["tokens"]) == whole


def test_nothing_is_written_where_one_looks(folder: Path, capsys: Capture) -> None:
    shown(capsys)
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]


@pytest.mark.e2e
def test_the_command_line_prints_one_document(cli: Cli, folder: Path) -> None:
    done = cli("inspect", *WORDS, "--row", "rows.jsonl:4", "--json")
    assert done.returncode == 0, done.stderr
    assert ids(json.loads(done.stdout)) == ["rows.jsonl:4"]
    text = cli("inspect", *WORDS, "--row", "rows.jsonl:4")
    assert text.returncode == 0, text.stderr
    assert "⟦it is 23757<|im_end|>⟧" in text.stdout  # where there is no colour, what carries loss is marked


def test_what_a_row_says_does_not_act_on_the_terminal(folder: Path, capsys: Capture) -> None:
    write(folder / "rows.jsonl", [{"prompt": "\x1b[31m[bold]", "completion": "\x07"}, {"\x1b[2Jprompt": "a"}])
    assert main(["inspect", *WORDS, "data.on_bad_row=skip"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[31m[bold]" in out
    assert "columns \\x1b[2Jprompt fit" in out
    assert "\x1b" not in out
    assert "\x07" not in out


# ----------------------------------------------------------------------------------------------------------- as HTML


class Page(HTMLParser):
    """Which elements are opened, which are left open, what is fetched, and the words."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        self.fetched += [str(value) for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_html_is_one_whole_page_that_needs_nothing_else(folder: Path, capsys: Capture) -> None:
    write(folder / "rows.jsonl", [{"prompt": "<script>alert(1)</script>", "completion": "it is 7 &amp; <b>more</b>"}])
    for _ in range(2):  # a page of its own is written anew
        assert main(["inspect", *WORDS, "--html", "page.html"]) == 0
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in folder.iterdir()) == ["page.html", "rows.jsonl"]
    page = Page()
    page.feed((folder / "page.html").read_text(encoding="utf-8"))
    page.close()
    assert page.open == []
    assert page.fetched == []
    assert "html" in page.tags
    assert "script" not in page.tags
    for words in ("rows.jsonl:1", "<script>alert(1)</script>", "&amp; <b>more</b>"):
        assert words in page.words.replace("\n", "")


def test_html_and_json_at_once_are_both_whole(folder: Path, capsys: Capture) -> None:
    assert ids(shown(capsys, "--html", "page.html", "--rows", "1")) == ["rows.jsonl:1"]
    assert (folder / "page.html").read_text().rstrip().endswith("</html>")


# ---------------------------------------------------------------------------------------------------- what it trains


def trained(folder: Path, overrides: list[str]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of each document in the batches that the trainer's data loader gives, padding taken off."""
    config = configs.to_config(configs.compose([*WORDS, f"data.path={folder}/rows.jsonl", *overrides]))
    data = prepare(config)
    trainer = trainers.build(config, RunDirectory(folder / "run"), data, [])
    pad = data.tokenizer.pad_token_id
    found = []
    for batch in trainer.get_train_dataloader():
        for i, row in enumerate(batch["input_ids"].tolist()):
            labels, positions = batch["labels"][i].tolist(), batch["position_ids"][i].tolist()
            starts = [at for at, position in enumerate(positions) if position == 0]
            for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
                real = [at for at in range(start, end) if row[at] != pad]
                found.append(([row[at] for at in real], [labels[at] for at in real]))
    return [document for document in found if document[0]]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        PACKED,
        [*PACKED, "model.attn_implementation=sdpa"],
        ["data.loss=all", "data.eval_rows=3"],
        ["data.deduplicate=exact", "chat_template=zephyr"],
    ],
    ids=" ".join,
)
def test_what_is_shown_is_what_trains(overrides: list[str], folder: Path, capsys: Capture) -> None:
    write(folder / "rows.jsonl", [*ROWS, ROWS[3], ROWS[5]])
    assert sorted(documents(shown(capsys, *overrides, "--rows", "99"))) == sorted(trained(folder, overrides))


def test_a_packed_row_is_shown_with_its_neighbours(folder: Path, capsys: Capture) -> None:
    """The neighbours that it has in the trainer's own row."""
    document = shown(capsys, *PACKED, "--row", "4")
    (row,) = document["rows"]
    names = [part["id"] for part in row["documents"]]
    assert "rows.jsonl:4" in names
    assert len(names) > 1
    assert row["id"].startswith("packed row ")
    assert len(row["tokens"]) == sum(part["tokens"] for part in row["documents"]) <= 128
    config = configs.to_config(configs.compose([*WORDS, *PACKED]))
    dataset = trainers.build(config, RunDirectory(folder / "run"), prepare(config), []).train_dataset
    assert tokens(row) in [(pack["input_ids"], pack["labels"]) for pack in dataset]
    assert main(["inspect", *WORDS, *PACKED, "--row", "4"]) == 0
    text = capsys.readouterr().out
    assert all(f"── {name}  " in text for name in names)
    assert f"documents {len(names)}" in text


def test_two_rows_of_one_packed_row_are_shown_once(folder: Path, capsys: Capture) -> None:
    rows = shown(capsys, *PACKED, "--rows", "99")["rows"]
    assert sorted(part["id"] for row in rows for part in row["documents"]) == sorted(
        f"rows.jsonl:{n}" for n in range(1, 13)
    )


def test_of_a_stream_the_rows_that_were_looked_at_are_shown(folder: Path, capsys: Capture) -> None:
    words = ["data.streaming=true", "trainer.max_steps=2"]
    assert ids(shown(capsys, *words, "--row", "12")) == ["rows.jsonl:12"]


# ------------------------------------------------------------------------------------------------------- of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed run of two steps, without the file and the cache that its data came from."""
    path = tmp_path_factory.mktemp("finished")
    write(path / "rows.jsonl", [*ROWS, {"prompt": "a"}])
    words = [*WORDS, *PACKED, "trainer.max_steps=2", "data.on_bad_row=skip", "hydra.run.dir=run"]
    command = [sys.executable, "-m", "sft_lab", *words]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path / "rows.jsonl").unlink()
    return path / "run"


@pytest.mark.e2e
def test_a_run_shows_the_rows_that_it_trained_on(finished: Path, folder: Path, capsys: Capture) -> None:
    of_run = shown(capsys, "--rows", "99", of=[str(finished)])
    assert of_run["left_out"] == {"bad": ["rows.jsonl:13"]}
    data = Prepared.load(RunDirectory(finished))
    assert sorted(documents(of_run)) == sorted((row["input_ids"], row["labels"]) for row in data.train)
    write(folder / "rows.jsonl", [*ROWS, {"prompt": "a"}])  # as it was before the run
    again = shown(capsys, *PACKED, "data.on_bad_row=skip", "--rows", "99")
    assert of_run == again


@pytest.mark.e2e
def test_a_run_needs_neither_its_file_nor_the_cache(
    finished: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_LAB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    (row,) = shown(capsys, "--row", "rows.jsonl:5", of=[str(finished)])["rows"]
    assert "rows.jsonl:5" in [part["id"] for part in row["documents"]]
    told = refused(capsys, str(finished), "--row", "13")
    assert "it was left out (bad: columns prompt fit no format" in told
    assert list(tmp_path.iterdir()) == []
    before = sorted(path.name for path in finished.iterdir())
    assert main(["inspect", str(finished)]) == 0
    assert sorted(path.name for path in finished.iterdir()) == before


@pytest.mark.e2e
def test_a_run_that_ended_before_its_data_was_written(finished: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "config.yaml", run)
    assert "ended before its data was written" in refused(capsys, str(run))


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*WORDS, "--rows", "0"], "--rows=0 : too small (allowed: 1 and more)"),
        ([*WORDS, "--rows", "-3"], "--rows=-3 : too small (allowed: 1 and more)"),
        ([*WORDS, "--rows", "many"], "argument --rows: invalid int value: 'many'"),
        (
            [*WORDS, "--row", "the third"],
            "--row=the third : no row's name (allowed: FILE:NUMBER, or NUMBER, such as rows",
        ),
        ([*WORDS, "--row", "rows.jsonl"], "--row=rows.jsonl : no row's name (allowed: FILE:NUMBER, or NUMBER, such as"),
        ([*WORDS, "--row", "1#a"], "--row=1#a : no row's name"),
        ([*WORDS, "--row", "²"], "--row=² : no row's name"),
        ([*WORDS, "--row", ""], "--row= : no row's name"),
        ([*WORDS, "--row", "1", "--longest"], "argument --longest: not allowed with argument --row"),
        ([*WORDS, "--shortest", "--longest"], "argument --longest: not allowed with argument --shortest"),
        ([*WORDS, "--html", "nowhere/page.html"], "--html=nowhere/page.html : no file can be written there"),
        ([*WORDS, "--html", "."], "--html=. : no file can be written there"),
        ([*WORDS, "--jsn"], "unrecognized arguments: --jsn"),
        ([*WORDS, "-m"], "inspect -m : one run at a time"),
        ([".", *WORDS], "a run's directory or overrides, not both"),
        ([".", "peft=lora_r8"], "inspect . peft=lora_r8 : a run's directory or overrides, not both"),
        ([".", "nowhere"], "inspect . nowhere : a run's directory or overrides, not both"),
        (["nowhere"], "nowhere: no such run directory"),
        (["."], ".: not a run directory, it has no config.yaml"),
        (["--config-dir", "nowhere", *WORDS], "--config-dir=nowhere : no such directory"),
        (["trainer.learning_rte=1"], "did you mean trainer.learning_rate?"),
        ([*WORDS, "data.path=nowhere.jsonl"], "data.path=nowhere.jsonl : no such file"),
    ],
    ids=lambda value: " ".join(w for w in value if w not in WORDS) if isinstance(value, list) else "",
)
def test_refused_in_words(words: list[str], said: str, folder: Path, capsys: Capture) -> None:
    assert said in refused(capsys, *words)
    assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]


def test_bad_rows_are_refused_as_of_a_training(folder: Path, capsys: Capture) -> None:
    write(folder / "rows.jsonl", [ROWS[0], {"prompt": "a"}])
    assert "rows.jsonl: row 2: columns prompt fit no format" in refused(capsys, *WORDS)


def test_help_names_the_options(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", "--help"])
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--rows", "--row ", "--longest", "--shortest", "--json", "--html"))
