"""`plan`: what a run would do, as a person reads it and as a script does, without a trace of it afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sft_lab.__main__ import main
from tests.conftest import Cli

ROWS = [{"prompt": f"what is {i} plus {i}?", "completion": f"it is {i + i}"} for i in range(12)]
WORDS = ["model=tiny_llama", "tracking=none", "data=from_file", "data.path=rows.jsonl", "trainer.max_steps=2"]

# What scripts rely on; more keys are welcome.
KEYS = {
    "ok", "findings", "rows", "eval_rows", "tokens", "steps", "tokens_per_step", "parameters", "memory", "time_s",
    "checkpoint_bytes", "adapter_bytes", "disk_bytes", "config",
}  # fmt: skip
BELOW = {
    "rows": {"read", "kept", "dropped"},
    "tokens": {"total", "supervised", "padding_share"},
    "parameters": {"total", "trainable"},
}
CONFIG = {"seed", "model", "peft", "quant", "data", "chat_template", "trainer", "distributed", "tracking", "evaluation"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with rows.jsonl in it."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def add(folder: Path, *rows: Any) -> None:
    with open(folder / "rows.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


# ---------------------------------------------------------------------------------------------------------- as JSON


@pytest.mark.e2e
def test_json_is_one_document_and_the_same_from_the_cache(cli: Cli, folder: Path) -> None:
    """Two processes at different times, of which the second finds the tokens that the first made."""
    env = {"SFT_LAB_CACHE": str(folder.parent / f"{folder.name}-cache")}
    cold, warm = (cli("plan", *WORDS, "--json", env=env) for _ in range(2))
    assert cold.returncode == warm.returncode == 0, cold.stderr
    assert cold.stdout == warm.stdout
    assert len(list(Path(env["SFT_LAB_CACHE"]).glob("data/*/key.json"))) == 1
    report = json.loads(cold.stdout)
    assert set(report) >= KEYS
    for name, keys in BELOW.items():
        assert set(report[name]) >= keys
    assert set(report["config"]) >= CONFIG
    for finding in report["findings"]:
        assert set(finding) >= {"name", "level", "message", "rows"}
        assert finding["level"] in ("error", "warning", "fact")
    assert report["rows"] == {"read": 12, "kept": 12, "dropped": {}}
    assert report["steps"] == 2
    assert listing(folder) == ["rows.jsonl"]


@pytest.mark.e2e
@pytest.mark.parametrize(
    "more",
    [
        ["data.eval_rows=3", "trainer.packing=true", "evaluation.rows=0"],
        pytest.param(["peft=none", "chat_template=llama3"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_a_training_records_what_plan_said(cli: Cli, folder: Path, more: list[str]) -> None:
    where = ["hydra.run.dir=run"]
    plan = cli("plan", *WORDS, *more, *where, "--json")
    assert plan.returncode == 0, plan.stderr
    done = cli(*WORDS, *more, *where)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run" / "preflight.json").read_text()) == json.loads(plan.stdout)


def test_an_error_is_on_standard_output_and_in_the_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(folder, {"prompt": "a", "completion": "b<|im_end|>"})
    assert main(["plan", *WORDS, "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    (error,) = [finding for finding in report["findings"] if finding["level"] == "error"]
    assert (error["name"], error["rows"]) == ("extra_eos", ["rows.jsonl:13"])
    assert main(["plan", *WORDS, "--json", "preflight.allow=[extra_eos]"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    assert listing(folder) == ["rows.jsonl"]


@pytest.mark.parametrize("flags", [["--json"], []], ids=["JSON", "text"])
def test_a_file_whose_name_is_no_unicode(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in [*ROWS, {"text": "hello"}])
    (tmp_path / "rows" / os.fsdecode(b"caf\xe9.jsonl")).write_text(lines)
    assert main(["plan", *WORDS, f"data.path={tmp_path}/rows", *flags]) == 0
    assert f"{tmp_path}/rows/caf\\udce9.jsonl:13" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- as text


def test_text_has_errors_first_then_warnings_then_facts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = [{"prompt": f"a{i}", "completion": f"b{i}<|im_end|>"} for i in range(5)]
    add(folder, *extra, {"prompt": "c", "completion": ""}, {"text": "d"})
    assert main(["plan", *WORDS]) == 2
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    levels = [line.split()[0] for line in lines if not line.startswith(" ") and line.split()[0] != "and"]
    assert levels == sorted(levels, key=["error", "warning", "fact"].index)
    assert set(levels) == {"error", "warning", "fact"}
    assert lines[0].split(maxsplit=2)[:2] == ["error", "extra_eos"]
    assert lines[0].endswith("5 of 19 rows end a turn with its end token twice")
    assert [line.strip() for line in lines[1:5]] == [*(f"rows.jsonl:{n}" for n in (13, 14, 15)), "and 2 more"]
    assert any("empty_answer" in line for line in lines)
    assert "cache" in shown.err
    assert listing(folder) == ["rows.jsonl"]


def test_what_the_text_shows_is_what_json_holds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert main(["plan", *WORDS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(maxsplit=2) for line in lines) == sorted(
        [finding["level"], finding["name"], finding["message"]] for finding in findings
    )


def test_what_a_reason_quotes_does_not_act_on_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(folder, {"\x1b[31mprompt": "a"})
    assert main(["plan", *WORDS, "data.on_bad_row=skip"]) == 0
    shown = capsys.readouterr().out
    assert "rows.jsonl:13: columns \\x1b[31mprompt fit no format" in shown
    assert "\x1b" not in shown


def test_a_cache_hit_or_why_there_was_none_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.jsonl").rename(folder / "others.jsonl")
    said = []
    for more in ([], [], ["trainer.max_length=100"], ["trainer.learning_rate=1"]):
        assert main(["plan", *WORDS, "data.path=others.jsonl", *more]) == 0
        said.append(capsys.readouterr().err)
    assert "cache miss (this data was not prepared before)" in said[0]
    assert "cache hit" in said[1]
    assert "cache miss (changed: max_length)" in said[2]
    assert "cache hit" in said[3]


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "peft.r=8,16"], "plan -m : one run at a time"),
        (["--multirun", "peft.r=8,16"], "plan -m : one run at a time"),
        (["trainer.learning_rte=1"], "trainer.learning_rte=1 : no such key; did you mean trainer.learning_rate?"),
        (["peft.r=abc"], "peft.r=abc : allowed is an integer"),
        (["data=from_file", "data.path=nowhere.jsonl"], "data.path=nowhere.jsonl : no such file"),
        (["quant=nf4", "peft=none"], "quant=nf4 with peft=none"),
        (["preflight.alow=[leak]"], "did you mean preflight.allow?"),
        (["trainer.streaming=true"], "trainer.streaming=true : no such key; did you mean data.streaming?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refused_in_words_before_anything_heavy(words: list[str], said: str, tmp_path: Path) -> None:
    """torch and transformers take seconds to import; a mistyped key must come back at once."""
    program = """if True:
        import sys
        from sft_lab.__main__ import main
        code = main()
        heavy = {"torch", "transformers", "datasets", "trl", "peft", "wandb"}
        print(sorted(heavy & set(sys.modules)), file=sys.stderr)
        sys.exit(code)
    """
    command = [sys.executable, "-c", program, "plan", *words, "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert listing(tmp_path) == []


def test_a_word_that_is_no_override_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *WORDS, "rows.jsonl"]) == 2
    assert "rows.jsonl" in capsys.readouterr().err


def test_bad_rows_are_refused_as_of_a_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(folder, {"prompt": "a"}, 7)
    assert main(["plan", *WORDS, "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2 problems, nothing was started" in shown.err
    assert all(f"rows.jsonl: row {n}: " in shown.err for n in (13, 14))
    assert listing(folder) == ["rows.jsonl"]


def test_nothing_of_a_run_directory_is_made_even_where_it_is_named(folder: Path) -> None:
    assert main(["plan", *WORDS, "hydra.run.dir=deep/er/run"]) == 0
    assert listing(folder) == ["rows.jsonl"]


def test_help_names_the_options(cli: Cli) -> None:
    done = cli("plan", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: sft_lab plan ")
    assert "--json" in done.stdout
