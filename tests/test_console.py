"""Where nobody reads what is printed any more: a pipe whose reader has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from tests.sweep.rundirs import write_run
from tests.test_run import read

pytestmark = pytest.mark.e2e

SHORT = [
    "model=tiny_llama", "trainer.max_steps=4", "trainer.logging_steps=1", "data.train_rows=40", "data.eval_rows=4",
    "evaluation.rows=2", "evaluation.max_new_tokens=4", "tracking=none",
]  # fmt: skip


def unread(words: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command with a standard output that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        return ran(words, cwd, closed)


def ran(words: list[str], cwd: Path, stdout: IO[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sft_lab", *words]
    return subprocess.run(command, cwd=cwd, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=600, check=False)


def test_a_training_goes_on_to_its_end(tmp_path: Path) -> None:
    result = unread([*SHORT, "hydra.run.dir=run"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
    assert read(tmp_path / "run" / "status.json")["state"] == "completed"
    assert "eval_loss" in read(tmp_path / "run" / "result.json")["metrics"]


def test_a_sweep_goes_on_to_its_end(tmp_path: Path) -> None:
    result = unread(["-m", *SHORT, "sweep.name=s", "peft=lora_r8,lora_r16"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    sweep = tmp_path / "outputs" / "sweeps" / "s"
    assert [read(sweep / name / "status.json")["state"] for name in read(sweep / "sweep.json")["trials"]] == [
        "completed",
        "completed",
    ]
    assert (sweep / "report.html").is_file()


@pytest.mark.parametrize("words", [["--help"], ["compare", "one", "two"], ["compare", "one", "two", "--json"]])
def test_an_answer_that_is_not_read_ends_quietly(tmp_path: Path, words: list[str]) -> None:
    for name, rank in (("one", 8), ("two", 16)):
        write_run(tmp_path / name, {"peft.r": rank})
    assert unread(words, tmp_path).stderr == ""
