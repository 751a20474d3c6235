"""What of a finished run is needed to answer with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_lab import config as configs
from sft_lab.__main__ import main
from sft_lab.runs import RunDirectory, write_json, write_text
from tests.data.preparing import config_of


@pytest.fixture
def of_another_version(tmp_path: Path) -> RunDirectory:
    """A run whose data lies there as this version does not know it."""
    run = RunDirectory(tmp_path / "run")
    for folder in (run.adapter, run.data / "train"):
        folder.mkdir(parents=True)
    write_text(run.config, configs.to_yaml(config_of("data.path=x.jsonl")))
    write_json(run.status, {"state": "failed"})
    return run


@pytest.mark.parametrize(
    "words", [["chat", "RUN", "--prompt", "hi"], ["eval", "RUN"], ["inspect", "RUN"], ["resume", "RUN"]]
)
def test_data_of_another_version_is_a_sentence(
    words: list[str], of_another_version: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(of_another_version.path)
    assert main([word.replace("RUN", path) for word in words]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"sft_lab: {path}: its data/ has no train-0.arrow: ")
    assert len(told.splitlines()) == 1
