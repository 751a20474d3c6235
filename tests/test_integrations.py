"""The trackers besides W&B, each read back by its own library. Trackio and MLflow are tested where they are installed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sft_lab import integrations, tracking
from sft_lab.errors import ConfigError, RunError
from sft_lab.runs import RunDirectory
from sft_lab.schema import TrackingConfig
from tests.conftest import Cli

QUICK = [
    "model=tiny_llama", "trainer.max_steps=4", "trainer.logging_steps=2", "trainer.eval_steps=2", "data.train_rows=64",
    "data.eval_rows=8", "evaluation.rows=4", "evaluation.max_new_tokens=8", "hydra.run.dir=runs/one",
]  # fmt: skip
Series = dict[str, list[tuple[int, float]]]


def new_run(path: Path) -> RunDirectory:
    path.mkdir(parents=True)
    return RunDirectory(path)


def train(cli: Cli, method: str, folder: Path, *words: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Events and final metrics of a run tracked by `method`."""
    done = cli(*QUICK, f"tracking={method}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data lineage, samples and the adapter are in the run directory only" in done.stdout
    run = folder / "runs" / "one"
    assert not (run / "wandb").exists()
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return events, json.loads((run / "result.json").read_text())["metrics"]


def losses(events: list[dict[str, Any]], split: str) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events if event["split"] == split and "loss" in event}


def read_tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.e2e
def test_tensorboard(cli: Cli, tmp_path: Path) -> None:
    events, metrics = train(cli, "tensorboard", tmp_path)
    seen = read_tensorboard(tmp_path / "runs" / "one" / "tensorboard")
    for split in ("train", "eval"):
        assert dict(seen[f"{split}/loss"]) == pytest.approx(losses(events, split))
    assert seen["final/eval_loss"] == [(4, pytest.approx(metrics["eval_loss"]))]
    assert "final/exact_match" in seen


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow")
def test_mlflow(cli: Cli, tmp_path: Path) -> None:
    events, metrics = train(cli, "mlflow", tmp_path, "tracking.project=p", "tracking.group=g", "tracking.notes=why")
    (seen,) = mlflow_runs(tmp_path / "runs" / "mlflow.db", "p")
    assert (seen.info.run_name, seen.info.status) == ("one", "FINISHED")
    assert (seen.data.tags["group"], seen.data.tags["mlflow.note.content"]) == ("g", "why")
    assert seen.data.metrics["loss"] == losses(events, "train")[4]
    assert seen.data.metrics["final/eval_loss"] == metrics["eval_loss"]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_trackio(cli: Cli, tmp_path: Path) -> None:
    import sqlite3

    events, metrics = train(cli, "trackio", tmp_path, "tracking.project=p", "tracking.group=g")
    with sqlite3.connect(tmp_path / "runs" / "trackio" / "p.db") as database:
        rows = [(run, json.loads(text)) for run, text in database.execute("select run_name, metrics from metrics")]
    assert {run for run, _ in rows} == {"g-one"}
    logged = {row["train/global_step"]: row["train/loss"] for _, row in rows if "train/loss" in row}
    assert logged == losses(events, "train")
    assert rows[-1][1]["final/eval_loss"] == metrics["eval_loss"]


@pytest.mark.parametrize("method", ["tensorboard", "trackio", "mlflow"])
def test_a_missing_package_is_told_at_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"^tracking.method={method} : the package {method} .*'sft-lab\[{method}\]'"):
        tracking.require(TrackingConfig(method=method))


@pytest.mark.e2e
@pytest.mark.skipif(find_spec("trackio") is not None, reason="trackio is installed")
def test_a_missing_package_stops_the_run_before_it_writes(cli: Cli, tmp_path: Path) -> None:
    done = cli(*QUICK, "tracking=trackio")
    assert (done.returncode, list(tmp_path.iterdir())) == (2, [])
    assert "tracking.method=trackio : the package trackio is not installed" in done.stderr


def test_tensorboard_closes_its_file_however_the_run_ends(tmp_path: Path) -> None:
    import threading

    before = threading.active_count()
    for name in ("one", "two"):
        tracker = tracking.open_tracker(TrackingConfig(method="tensorboard"), new_run(tmp_path / name), {})
        tracker.finish(1)
        tracker.finish(0)
    assert threading.active_count() == before


@pytest.fixture
def _mlflow() -> Iterator[None]:
    mlflow = pytest.importorskip("mlflow")
    yield
    mlflow.end_run()
    mlflow.set_tracking_uri(None)
    logging.getLogger("mlflow").setLevel(logging.NOTSET)


def mlflow_runs(database: Path, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id], order_by=["start_time ASC"]))


@pytest.mark.usefixtures("_mlflow")
def test_each_run_of_a_process_is_a_run_in_mlflow_and_ends_as_it_did(tmp_path: Path) -> None:
    settings = TrackingConfig(method="mlflow", group="g", tags=["a", "b"])
    for name, exit_code in {"one": 1, "two": 143, "three": 0}.items():
        tracker = tracking.open_tracker(settings, new_run(tmp_path / "s" / name), {})
        tracker.finish(exit_code)
        tracker.finish(0)
    resumed = tracking.open_tracker(settings, RunDirectory(tmp_path / "s" / "two"), {})
    resumed.summary({"eval_loss": 2.0, "steps": 4, "note": "no number"})
    resumed.finish(0)
    seen = mlflow_runs(tmp_path / "s" / "mlflow.db", "sft_lab")
    assert [(run.info.run_name, run.info.status) for run in seen] == [
        ("one", "FAILED"),
        ("two", "FINISHED"),
        ("three", "FINISHED"),
    ]
    assert {run.data.tags["tags"] for run in seen} == {"a,b"}
    assert seen[1].data.metrics == {"final/eval_loss": 2.0, "final/steps": 4.0}


@pytest.mark.usefixtures("_mlflow")
def test_an_mlflow_that_cannot_be_used_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://host")
    with pytest.raises(RunError, match=r"^tracking.method=mlflow : nonsense://host: "):
        tracking.open_tracker(TrackingConfig(method="mlflow"), new_run(tmp_path / "one"), {})


def test_a_trial_has_its_sweep_in_its_name_where_there_are_no_groups(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "r8")
    assert integrations.run_name(TrackingConfig(), run) == "r8"
    assert integrations.run_name(TrackingConfig(group="ranks"), run) == "ranks-r8"
    assert integrations.run_name(TrackingConfig(group="ranks", name="mine"), run) == "ranks-mine"
