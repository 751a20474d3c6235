"""README is true: what it names exists, and what it shows can be run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sft_lab import command_line
from sft_lab import config as configs
from sft_lab.__main__ import VERBS
from sft_lab.options import groups
from sft_lab.runs import RunDirectory

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for line in re.findall(r"^    (?:\.venv/bin/)?(python -m sft_lab.*)$", README, flags=re.MULTILINE)
]


def test_it_is_short_and_shows_commands() -> None:
    assert len(README.splitlines()) < 200
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_is_one(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs exist; everything else composes, the files it names being there."""
    monkeypatch.chdir(tmp_path)
    for name in ("chats.jsonl", "test.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "multirun_examples").symlink_to(ROOT / "multirun_examples")
    words = command[3:]
    if words and words[0] in ("plan", "inspect"):
        words = [word for word in words[1:] if "=" in word]
    if words and words[0] in VERBS and words[0] != "train":
        assert words[0] in ("env", "compare") or words[1] == "RUN_DIR"
        overrides = [word for word in words[2:] if word.startswith("data")]
        if overrides:
            configs.compose(overrides)
        return
    command_line.check(command_line.parse(words))


def test_every_option_is_in_its_table() -> None:
    for group, options in groups().items():
        if not options:
            continue
        (row,) = re.findall(rf"^\| `{group}` \|(.*)\|$", README, flags=re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row.split("|")[0])) == set(options)


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"make ([\w-]+) ", README)) - {"are"}
    assert {"demo", "test"} <= named & targets


def test_every_file_of_a_run_is_told_of(tmp_path: Path) -> None:
    paths = {p.name for p in vars(RunDirectory(tmp_path)).values() if isinstance(p, Path) and p.parent == tmp_path}
    assert {name for name in paths if name not in README} == set()
