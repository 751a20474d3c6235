"""A user's files stay as they are, whatever verb is given their directory, and by whatever option."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_lab import checkpoints
from sft_lab.errors import ConfigError
from sft_lab.runs import RunDirectory, whole_directory
from tests.conftest import Cli

Main = Callable[..., Any]
QUICK = (
    "model=tiny_llama",
    "data.train_rows=20",
    "data.eval_rows=0",
    "evaluation.rows=0",
    "trainer.max_steps=1",
    "tracking=none",
)
MINE = {
    "data": {"data/rows.jsonl": '{"prompt": "a", "completion": "b"}\n'},
    "adapter": {"adapter/adapter_model.safetensors": "mine", "adapter/adapter_config.json": "{}"},
    "checkpoints": {"checkpoints/checkpoint-7/model.safetensors": "mine"},
    "config.yaml": {"config.yaml": "project: mine\n"},
    "sweep.json": {"sweep.json": '{"trials": 3}'},
    "status.json": {"status.json": '{"ok": true}'},
    "overrides.yaml": {"overrides.yaml": "[]"},
    "report.html": {"report.html": "<p>mine</p>"},
    "train.log": {"train.log": "mine"},
    "planned": {"planned/notes.txt": "mine"},
    "wandb": {"wandb/settings": "mine"},
}  # fmt: skip
MINE["everything"] = {name: text for files in list(MINE.values()) for name, text in files.items()}
NEW_RUN = {
    "train": (*QUICK, "hydra.run.dir=mine"),
    "train, absolute": (*QUICK, "hydra.run.dir={root}/mine"),
    "plan": ("plan", *QUICK, "hydra.run.dir=mine"),
    "plan --json": ("plan", *QUICK, "hydra.run.dir=mine", "--json"),
    "sweep": ("-m", *QUICK, "sweep.objective=none", "hydra.sweep.dir=mine", "seed=1,2"),
    "search": ("-m", *QUICK, "data.eval_rows=2", "hydra/sweeper=optuna", "hydra.sweep.dir=mine", "seed=1,2"),
    "dry run": ("-m", *QUICK, "sweep.objective=none", "hydra.sweep.dir=mine", "seed=1,2", "sweep.dry_run=true"),
}  # fmt: skip
ON_A_RUN = {
    "resume": ("resume", "mine"),
    "eval": ("eval", "mine"),
    "chat": ("chat", "mine", "--prompt", "hello"),
    "inspect": ("inspect", "mine"),
    "compare": ("compare", "mine"),
    "repro": ("repro", "mine"),
}


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "directory"
        for path in sorted(folder.rglob("*"))
    }


# Each thing alone for one run and one sweep, and all of it at once for every way to begin one.
BEGUN = [(name, mine) for name in NEW_RUN for mine in (MINE if name in ("plan", "dry run") else ("everything", "data"))]


@pytest.mark.parametrize(("name", "mine"), BEGUN)
def test_a_run_or_sweep_does_not_begin_among_a_users_files(main: Main, tmp_path: Path, name: str, mine: str) -> None:
    words = NEW_RUN[name]
    put(tmp_path / "mine", MINE[mine])
    before = contents(tmp_path)
    result = main(*(word.format(root=tmp_path) for word in words))
    assert result.returncode == 2, result.stderr
    first = sorted(MINE[mine])[0].split("/")[0]
    assert f"holds the {'directory' if (tmp_path / 'mine' / first).is_dir() else 'file'} {first}" in result.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("mine", MINE)
@pytest.mark.parametrize("words", ON_A_RUN.values(), ids=ON_A_RUN)
def test_a_verb_on_a_run_refuses_a_directory_that_is_none(
    main: Main, tmp_path: Path, words: tuple[str, ...], mine: str
) -> None:
    put(tmp_path / "mine", MINE[mine])
    before = contents(tmp_path)
    result = main(*words)
    assert result.returncode == 2, result.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_the_directory_where_the_command_is_typed_is_one_like_others(main: Main, tmp_path: Path, verb: str) -> None:
    put(tmp_path, MINE["data"])
    rows = ("data=from_file", "data.path=data/rows.jsonl", *QUICK[:1], *QUICK[3:])
    for value, told in (("hydra.run.dir=.", "holds the directory data"), ("hydra.run.dir=''", "is empty")):
        before = contents(tmp_path)
        result = main(verb, *rows, value)
        assert (result.returncode, told in result.stderr) == (2, True), result.stderr
        assert contents(tmp_path) == before


def test_a_file_in_the_way_is_no_directory(main: Main, tmp_path: Path) -> None:
    put(tmp_path, {"mine": "text"})
    for value in ("mine", "mine/run"):
        result = main(*QUICK, f"hydra.run.dir={value}")
        assert result.returncode == 2
        assert f"{tmp_path / 'mine'} is no directory" in result.stderr
    assert contents(tmp_path).keys() == {"mine"}


@pytest.mark.e2e
def test_a_run_leaves_the_folder_that_it_trains_on_alone(cli: Cli, tmp_path: Path) -> None:
    """Through the real command line, which is where a user lost data/ to data/."""
    put(tmp_path, MINE["data"])
    before = contents(tmp_path)
    result = cli("model=tiny_llama", "data=from_file", "data.path=data/rows.jsonl", *QUICK[3:], "hydra.run.dir=.")
    assert result.returncode == 2
    assert contents(tmp_path) == before


@pytest.mark.e2e
@pytest.mark.slow
def test_repro_does_not_begin_among_a_users_files(cli: Cli, tmp_path: Path) -> None:
    assert cli(*QUICK, "hydra.run.dir=run").returncode == 0
    put(tmp_path / "mine", MINE["everything"])
    before = contents(tmp_path)
    for place, told in (("mine", "holds the directory adapter"), ("", "--run-dir= : is empty"), ("run", "holds a run")):
        result = cli("repro", "run", "--run-dir", place)
        assert (result.returncode, told in result.stderr) == (2, True), result.stderr
    assert contents(tmp_path) == before


def test_what_a_run_leaves_that_was_killed_early_is_begun_in_again(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            ".lock": "",
            ".reserve": "",
            "overrides.yaml": "[]",
            ".config.yaml.01234567.tmp": "",
            "slurm-12.out": "",
            ".submitit/1/log": "",
            "status.json": json.dumps({"state": "failed", "error": "no", "step": 0}),
        },
    )
    (tmp_path / "checkpoints").mkdir()  # another disk, perhaps
    RunDirectory(tmp_path).require_free()
    (tmp_path / ".lock").unlink()
    with pytest.raises(ConfigError, match=r"holds the file overrides\.yaml"):
        RunDirectory(tmp_path).require_free()


def test_the_folder_of_a_users_with_the_name_of_a_trial_stops_the_sweep(main: Main, tmp_path: Path) -> None:
    words = ("-m", *QUICK, "sweep.objective=none", "hydra.sweep.dir=sweep", "seed=1,2", "sweep.dry_run=true")
    assert main(*words).returncode == 0
    from sft_lab import config as configs
    from sft_lab.sweep.ledger import trial_name

    trial = trial_name(configs.to_config(configs.compose([*QUICK, "seed=1", "sweep.name=x"])))
    (tmp_path / "sweep").mkdir(exist_ok=True)
    put(tmp_path / "sweep", {"sweep.json": json.dumps({"name": "sweep", "trials": {}, "left_out": []})})
    put(tmp_path / "sweep" / trial, MINE["data"])
    before = contents(tmp_path / "sweep" / trial)
    result = main(*words[:-1])
    assert result.returncode == 2
    assert "holds the directory data" in result.stderr
    assert contents(tmp_path / "sweep" / trial) == before


def test_a_page_replaces_no_file_but_a_page(main: Main, tmp_path: Path) -> None:
    put(tmp_path, {"page.html": "<p>mine</p>"})
    words = ("inspect", *QUICK[:3])
    result = main(*words, "--html", "page.html")
    assert (result.returncode, "a file lies there that sft_lab did not write" in result.stderr) == (2, True)
    assert (tmp_path / "page.html").read_text() == "<p>mine</p>"
    for _ in range(2):
        assert main(*words, "--html", "own.html").returncode == 0
    assert main(*words, "--html", "").returncode == 2


# ------------------------------------------------------------------------------------------------ the second defence


def test_a_directory_is_replaced_only_where_it_is_known(tmp_path: Path) -> None:
    put(tmp_path / "data", {"rows.jsonl": "mine"})
    with (
        pytest.raises(ConfigError, match="holds files that no run wrote"),
        whole_directory(tmp_path / "data", "facts.json"),
    ):
        raise AssertionError
    put(tmp_path / "data", {"facts.json": "{}"})
    with whole_directory(tmp_path / "data", "facts.json") as folder:
        (folder / "facts.json").write_text("new")
    assert contents(tmp_path).keys() == {"data", "data/facts.json"}


def test_a_checkpoint_with_a_users_file_is_not_deleted(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    put(tmp_path / "checkpoints", {"checkpoint-7/notes.txt": "mine", "checkpoint-8/optimizer.pt": "torn"})
    with pytest.raises(ConfigError, match=r"checkpoint-7: is not complete and holds notes\.txt"):
        checkpoints.drop_torn(run)
    assert len(contents(tmp_path / "checkpoints")) == 4
    (run.checkpoints / "checkpoint-7" / "notes.txt").unlink()
    checkpoints.drop_torn(run)
    assert contents(tmp_path / "checkpoints") == {}


def test_only_checkpoints_by_number_are_checkpoints(tmp_path: Path) -> None:
    put(tmp_path / "checkpoints", {"checkpoint-abc/a": "mine", "checkpoint-35.bak/a": "mine", "checkpoint-9": "a file"})
    run = RunDirectory(tmp_path)
    assert checkpoints.newest(run) == (None, [])
    checkpoints.drop_torn(run)
    checkpoints.keep(run, 1)
    assert len(contents(tmp_path / "checkpoints")) == 5


def test_resume_touches_nothing_beside_a_copied_config(main: Main, tmp_path: Path) -> None:
    from sft_lab import config as configs

    put(tmp_path / "mine", {**MINE["data"], **MINE["checkpoints"]})
    (tmp_path / "mine" / "config.yaml").write_text(configs.to_yaml(configs.to_config(configs.compose(list(QUICK)))))
    before = contents(tmp_path)
    result = main("resume", "mine")
    assert (result.returncode, "no status.json of one" in result.stderr) == (2, True), result.stderr
    assert contents(tmp_path) == before
