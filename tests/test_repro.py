"""A run made again from its record, and what is said of the two."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sft_lab import repro
from sft_lab.errors import ConfigError
from sft_lab.repro import Difference
from sft_lab.runs import RunDirectory, write_json
from tests.conftest import Cli, online
from tests.fake_wandb import FakeWandb
from tests.test_run import check, read

pytestmark = pytest.mark.e2e

WORDS = [
    "model=tiny_llama", "peft=lora_r8", "peft.lora_dropout=0.1", "data=from_file", "data.path=rows.jsonl", "data.eval_rows=4",
    "trainer.max_steps=4", "trainer.logging_steps=2", "trainer.save_steps=2", "evaluation.rows=2", "tracking=none",
    "evaluation.max_new_tokens=4", "hydra.run.dir=run",
]  # fmt: skip


def write_rows(path: Path, word: str = "answer") -> None:
    rows = [{"prompt": f"question {i}", "completion": f"{word} {i} " * (1 + i % 5)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of a finished run `run` and its data."""
    place = tmp_path_factory.mktemp("finished")
    write_rows(place / "rows.jsonl")
    command = [sys.executable, "-m", "sft_lab", *WORDS]
    check(subprocess.run(command, cwd=place, capture_output=True, text=True, check=False))
    return place


def edited(run: Path, to: Path, **changes: Any) -> Path:
    """A copy of a run whose provenance.json says something else."""
    shutil.copytree(run, to)
    record = read(to / "provenance.json")
    for key, value in changes.items():
        section, name = key.split("__")
        assert record[section][name] != value
        record[section][name] = value
    write_json(to / "provenance.json", record)
    return to


def test_a_run_made_again_is_the_same_to_the_byte(finished: Path, tmp_path: Path, cli: Cli) -> None:
    """From another directory, with another number of threads, which is set back to the recorded one."""
    run = finished / "run"
    threads = read(run / "provenance.json")["hardware"]["torch_threads"]
    made = check(cli("repro", str(run), env={"OMP_NUM_THREADS": str(threads + 1)}))
    (again,) = tmp_path.glob("outputs/*/*")
    adapter = again / "adapter" / "adapter_model.safetensors"
    assert adapter.read_bytes() == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert f"hardware.torch_threads: {threads} -> {threads + 1}" in made.stdout
    assert f"torch is set to {threads} threads, as recorded" in made.stdout
    assert "adapter: byte-equal" in made.stdout
    assert "metrics: equal (train_loss, " in made.stdout
    assert f"the same result: {again}" in made.stdout
    assert read(again / "provenance.json")["hardware"]["torch_threads"] == threads
    assert (again / "overrides.yaml").read_text() == (run / "overrides.yaml").read_text()
    config = (run / "config.yaml").read_text()
    assert (again / "config.yaml").read_text() == config.replace("job_type: train", "job_type: repro")


def test_a_trial_made_again_is_no_trial_of_its_sweep(
    finished: Path, tmp_path: Path, cli: Cli, wandb_server: FakeWandb
) -> None:
    run = shutil.copytree(finished / "run", tmp_path / "trial")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["sweep"]["name"] = "s"
    config["tracking"] |= {"method": "wandb", "group": "s", "job_type": "trial", "tags": ["peft=lora_r8"]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    check(cli("repro", "trial", "--run-dir", "again", env=online(wandb_server)))
    (tracked,) = wandb_server.runs.values()
    assert (tracked.name, tracked.job_type, tracked.group or "") == ("again", "repro", "")
    assert tuple(tracked.tags) == ("peft=lora_r8",)


def test_another_version_is_told_and_the_run_is_made(finished: Path, tmp_path: Path, main: Cli) -> None:
    run = edited(finished / "run", tmp_path / "run", packages__peft="0.1.0", installed__wandb="0.2.0")
    peft, wandb = (read(finished / "run" / "provenance.json")["packages"][name] for name in ("peft", "wandb"))
    made = check(main("repro", "run", "--run-dir", "again", "--json"))
    told = json.loads(made.stdout)
    assert {"what": "packages.peft", "recorded": "0.1.0", "now": peft} in told["differences"]
    assert {"what": "installed.wandb", "recorded": "0.2.0", "now": wandb} in told["differences"]
    assert f"packages.peft: 0.1.0 -> {peft}" in made.stderr
    assert re.search(r"the result may differ for that: .*packages", made.stderr)
    assert (told["adapter_equal"], told["max_abs_difference"], told["same"]) == (True, 0.0, True)
    metrics = read(run / "result.json")["metrics"]
    assert told["metrics"] == {name: [value, value] for name, value in metrics.items()}
    assert told["run_dir"] == str(tmp_path / "again")
    assert read(tmp_path / "again" / "status.json")["state"] == "completed"


def test_other_data_is_refused_unless_allowed(finished: Path, tmp_path: Path, main: Cli) -> None:
    write_rows(tmp_path / "rows.jsonl", "another")
    run = shutil.copytree(finished / "run", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(finished / "rows.jsonl"), str(tmp_path / "rows.jsonl")))
    before = {path.name for path in tmp_path.iterdir()}
    refused = check(main("repro", "run", "--run-dir", "again", "--json"), code=2)
    assert "data_fingerprint: " in refused.stderr
    assert "the data is not what this run trained on (--allow data runs it nevertheless)" in refused.stderr
    assert "data_fingerprint" in [difference["what"] for difference in json.loads(refused.stdout)["differences"]]
    assert {path.name for path in tmp_path.iterdir()} == before
    made = check(main("repro", "run", "--run-dir", "again", "--allow", "data"), code=1)
    assert "adapter: not equal, by at most " in made.stdout
    assert "not the same result: " in made.stdout
    assert "train_loss: " in made.stdout


def test_an_unfinished_run_is_refused(tmp_path: Path, finished: Path, main: Cli) -> None:
    run = shutil.copytree(finished / "run", tmp_path / "run")
    write_json(run / "status.json", {"state": "interrupted"})
    refused = check(main("repro", "run"), code=2)
    assert "the run's state is interrupted" in refused.stderr
    assert f"resume {run}" in refused.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_record_that_is_not_there_is_refused(tmp_path: Path, finished: Path) -> None:
    run = RunDirectory(shutil.copytree(finished / "run", tmp_path / "run"))
    run.provenance.unlink()
    with pytest.raises(ConfigError, match=r"provenance\.json is missing"):
        repro.record_of(run)


def test_data_that_is_gone_is_named(tmp_path: Path, finished: Path) -> None:
    run = RunDirectory(shutil.copytree(finished / "run", tmp_path / "run"))
    run.config.write_text(run.config.read_text().replace(str(finished / "rows.jsonl"), f"{tmp_path}/rows.jsonl"))
    with pytest.raises(ConfigError, match=r"data\.path=.*/rows\.jsonl : no such file"):
        repro.record_of(run)


# ------------------------------------------------------------------------------------------------ what differs


def whats(run: RunDirectory, **changes: Any) -> dict[str, Difference]:
    config, record = repro.record_of(run)
    for key, value in changes.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    return {difference.what: difference for difference in repro.differences(record, config)}


def test_nothing_differs_from_what_is_here(finished: Path) -> None:
    """But for the threads of this process, and for a tree that someone edits meanwhile."""
    assert whats(RunDirectory(finished / "run")).keys() <= {"hardware.torch_threads", "git.diff"}


def test_each_part_is_compared(finished: Path) -> None:
    found = whats(
        RunDirectory(finished / "run"),
        git=None,
        packages={"torch": "1.0"},
        installed={"gone": "1.0"},
        hardware={"gpus": ["another"], "cpus": 1000},
        model={"fingerprint": "0"},
        data_fingerprint="0",
    )
    assert found.keys() - {"hardware.torch_threads"} >= {
        "packages.torch", "installed.gone", "hardware.gpus", "hardware.cpus", "model.fingerprint", "data_fingerprint",
    }  # fmt: skip
    assert found["installed.gone"].now == "not installed"
    assert "installed.torch" not in found
    refused = repro.refusals(list(found.values()), [])
    assert [problem.split(":")[0] for problem in refused] == ["data_fingerprint", "model.fingerprint"]
    assert len(repro.refusals(list(found.values()), ["model"])) == 1
    assert repro.refusals(list(found.values()), ["data", "model"]) == []


def git(diff: str = "", untracked: dict[str, str] | None = None) -> dict[str, Any]:
    untracked = untracked or {}
    return {
        "commit": "a",
        "dirty": bool(diff or untracked),
        "diff": diff,
        "untracked": untracked,
        "left_out": [],
    }


DIFF = "diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-one\n+{}\n"


@pytest.mark.parametrize(
    ("recorded", "now", "expected"),
    [
        (git(), git(), None),
        (git(DIFF.format("two")), git(DIFF.format("two")), None),
        (
            git(),
            git(DIFF.format("two")),
            "git.diff: clean -> 2 changed lines, 0 untracked files (not alike: x.py)",
        ),
        (
            git(DIFF.format("two"), {"new": "1"}),
            git(DIFF.format("six"), {"new": "2"}),
            "git.diff: 2 changed lines, 1 untracked files -> 2 changed lines, 1 untracked files (not alike: new, x.py)",
        ),
        ({"commit": "a", "dirty": False}, git(), None),
        (
            {"commit": "a", "dirty": True},
            git(DIFF.format("two")),
            "git.diff: uncommitted changes that were not recorded -> 2 changed lines, 0 untracked files",
        ),
        ({**git(), "commit": "b"}, git(), "git.commit: b -> a"),
        (None, git(), "git: no git checkout -> a"),
        (None, None, None),
    ],
)
def test_code_is_compared_to_the_line(
    recorded: dict[str, Any] | None, now: dict[str, Any] | None, expected: str | None
) -> None:
    found = [difference for difference in repro._code(recorded, now) if difference.real]
    assert [str(difference) for difference in found] == ([expected] if expected else [])
    assert all(difference.part == "code" for difference in found)


# -------------------------------------------------------------------------------------------------- two results


def result_of(path: Path, metrics: dict[str, float], **tensors: list[float]) -> RunDirectory:
    run = RunDirectory(path)
    run.adapter.mkdir(parents=True)
    write_json(run.result, {"metrics": metrics})
    save_file(
        {name: torch.tensor(values) for name, values in tensors.items()}, run.adapter / "adapter_model.safetensors"
    )
    return run


def test_the_largest_difference_is_found(tmp_path: Path) -> None:
    one = result_of(tmp_path / "one", {"eval_loss": 1.0}, a=[1.0, 2.0], b=[0.0])
    two = result_of(tmp_path / "two", {"eval_loss": 1.5, "new": 1.0}, a=[1.0, 2.25], b=[-0.125])
    assert repro.compare(one, two) == {
        "adapter_equal": False,
        "max_abs_difference": 0.25,
        "tensor": "a",
        "metrics": {"eval_loss": [1.0, 1.5], "new": [None, 1.0]},
        "same": False,
    }


def test_equal_bytes_with_another_metric_are_not_the_same_result(tmp_path: Path) -> None:
    one = result_of(tmp_path / "one", {"eval_loss": 1.0}, a=[1.0])
    two = result_of(tmp_path / "two", {"eval_loss": 1.5}, a=[1.0])
    found = repro.compare(one, two)
    assert (found["adapter_equal"], found["max_abs_difference"], found["same"]) == (True, 0.0, False)


def test_other_tensors_have_no_difference_in_numbers(tmp_path: Path) -> None:
    one = result_of(tmp_path / "one", {}, a=[1.0])
    other_name, other_shape = result_of(tmp_path / "two", {}, b=[1.0]), result_of(tmp_path / "three", {}, a=[1.0, 1.0])
    assert repro.largest_difference(one.adapter, other_name.adapter) == (None, "a")
    assert repro.largest_difference(one.adapter, other_shape.adapter) == (None, "a")
