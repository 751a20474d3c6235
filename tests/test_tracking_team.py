# ruff: noqa: F811  a fixture from another file and the argument that asks for it

"""What a team sees in W&B of runs and sweeps besides numbers: the data they share, the sweep's own run, the best adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb

from sft_lab.data import references
from sft_lab.runs import RunDirectory
from sft_lab.schema import DataConfig, SourceConfig, TrackingConfig
from sft_lab.tracking import open_tracker
from sft_lab.wandb_sweep import record_sweep
from tests.fake_wandb import Artifact, FakeWandb, Run
from tests.test_tracking import RESOLVED, config, event, fresh_client, log, new_run, run, server, sync  # noqa: F401


def artifacts(server: FakeWandb, kind: str) -> list[Artifact]:
    return [artifact for artifact in server.artifacts.values() if artifact.type == kind]


def named(server: FakeWandb, name: str) -> Run:
    (run,) = [run for run in server.runs.values() if run.name == name]
    return run


# ------------------------------------------------------------------------------------------------------------ lineage


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_runs_of_the_same_data_use_one_data_set(mode: str, server: FakeWandb, tmp_path: Path) -> None:
    rows = tmp_path / "some rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    data = DataConfig(source="file", path=str(rows))
    for name in ("first", "second"):
        tracker = open_tracker(config(mode=mode), new_run(tmp_path / name), RESOLVED)
        tracker.use_data("data-0123", references.uris(data), references.described(data, "0123", 1))
        tracker.finish(0)
        if mode == "offline":
            sync(tracker.message)

    (used,) = artifacts(server, "dataset")
    assert (used.name, used.files, used.committed) == ("data-0123", [], True)
    assert list(used.references.values()) == [rows.as_uri()]
    assert used.metadata == {"fingerprint": "0123", "rows": 1, "source": "file", "path": str(rows)}
    assert [run.used for run in server.runs.values()] == [["data-0123"]] * 2
    assert [body for path, body in server.files.items() if b'"text": "a"' in body] == []


def test_log_data_false_leaves_it_out(server: FakeWandb, run: RunDirectory) -> None:
    tracker = open_tracker(config(log_data=False), run, RESOLVED)
    tracker.use_data("data-0123", [], {})
    tracker.finish(0)
    assert (named(server, "first").used, server.artifacts) == ([], {})


def test_every_source_is_referred_to(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text("{}\n")
    mixture = DataConfig(
        source="mixture",
        sources={
            "chat": SourceConfig(path=str(tmp_path / "?.jsonl")),
            "code": SourceConfig(source="hub", path="org/code", revision="v2"),
        },
        eval_path=str(tmp_path / "eval.jsonl"),
    )
    *here, there, held_out = references.uris(mixture)
    assert here == [(tmp_path / name).as_uri() for name in ("a.jsonl", "b.jsonl")]
    assert there.endswith("/datasets/org/code/tree/v2")
    assert held_out == (tmp_path / "eval.jsonl").as_uri()
    assert references.described(mixture, "f", 2)["path"] == {"chat": str(tmp_path / "?.jsonl"), "code": "org/code"}


def test_generated_rows_lead_to_the_code_that_makes_them() -> None:
    (code,) = references.uris(DataConfig(source="requests", path=""))
    assert code.endswith("/data/requests.py")


# ----------------------------------------------------------------------------------------------- trouble on the way


def test_a_dead_client_costs_the_rest_of_its_own_run_only(
    server: FakeWandb, run: RunDirectory, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(config(mode="offline"), run, RESOLVED)
    before = psutil.Process().children(recursive=True)
    for process in before:
        process.kill()
    psutil.wait_procs(before)
    log(tracker, run, range(1, 11))
    tracker.table("samples", ["a"], [[1]], step=11)
    tracker.summary({"a": 1})
    tracker.use_data("data-0123", [], {})
    tracker.log_adapter(tmp_path, "adapter", {})
    tracker.finish(0)
    assert caplog.text.count("the client's service ended") == 1
    assert len(run.read_metrics()) == 10

    second = open_tracker(config(), new_run(tmp_path / "second"), RESOLVED)
    log(second, RunDirectory(tmp_path / "second"), range(1, 4))
    second.finish(0)
    assert named(server, "second").steps == [1, 2, 3]


@pytest.mark.e2e
def test_an_outage_in_mid_sweep_loses_no_trial(server: FakeWandb, tmp_path: Path) -> None:
    """The server fails while the second of four trials runs, and comes back after the third."""
    settings = config(group="sweep-7", job_type="trial", finish_timeout_s=1)
    messages = []
    for name in ("one", "two", "three", "four"):
        trial = new_run(tmp_path / name)
        server.fail_with = 500 if name == "three" else 0
        tracker = open_tracker(settings, trial, RESOLVED)
        server.fail_with = 500 if name in ("two", "three") else 0
        log(tracker, trial, range(1, 11))
        tracker.finish(0)
        messages.append(tracker.message)
    assert ["wandb sync" in message for message in messages] == [False, True, True, False]
    server.fail_with = 0
    for message in messages[1:3]:
        sync(message)
    for name in ("one", "two", "three", "four"):
        seen = named(server, name)
        assert (seen.steps, seen.group, seen.exit_code) == (list(range(1, 11)), "sweep-7", 0)


def test_a_run_of_an_agent_is_resumed_by_hand(
    server: FakeWandb, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents = {"WANDB_SWEEP_ID": "s", "WANDB_ENTITY": "team", "WANDB_PROJECT": "theirs", "WANDB_RUN_ID": "trial7"}
    for name, value in agents.items():
        monkeypatch.setenv(name, value)
    tracker = open_tracker(config(), run, RESOLVED)
    log(tracker, run, range(1, 4))
    tracker.finish(143)
    wandb.teardown()
    for name in agents:
        monkeypatch.delenv(name)
    tracker = open_tracker(config(), run, RESOLVED)
    log(tracker, run, range(4, 7))
    tracker.finish(0)
    assert list(server.runs) == [("theirs", "trial7")]
    assert named(server, "first").steps == [1, 2, 3, 4, 5, 6]


# ----------------------------------------------------------------------------------------------- the sweep's own run


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep's directory with a report and the adapter of its best trial."""
    folder = tmp_path / "sweeps" / "ranks"
    (folder / "r8" / "adapter").mkdir(parents=True)
    (folder / "r8" / "adapter" / "weights.safetensors").write_bytes(b"w" * 100)
    (folder / "report.html").write_text("<html>report</html>")
    return folder


def record(settings: TrackingConfig, sweep: Path, rows: int = 2, link_to: str = "") -> str:
    return record_sweep(
        settings,
        sweep,
        sweep.name,
        ["trial", "eval_loss"],
        [[f"r{8 * n}", 1 / n] for n in range(1, rows + 1)],
        report=sweep / "report.html",
        best=(sweep / "r8" / "adapter", "r8", {"metrics": {"eval_loss": 0.5}}),
        link_to=link_to,
        summary={"eval_loss": 0.5, "trials": rows},
    )


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_sweep_has_a_run_of_its_own(mode: str, server: FakeWandb, sweep: Path) -> None:
    message = record(config(mode=mode, tags=["a"], notes="why"), sweep)
    if mode == "offline":
        sync(message)
    seen = named(server, "ranks")
    assert (seen.group, seen.job_type, seen.tags, seen.notes) == ("ranks", "sweep", ["a"], "why")
    assert (seen.summary["eval_loss"], seen.summary["trials"], seen.exit_code) == (0.5, 2, 0)
    (row,) = seen.history
    assert (row["sweep/trials"]["_type"], row["sweep/trials"]["nrows"]) == ("table-file", 2)
    report = server.files[f"/upload/p/{seen.id}/{row['sweep/report']['path']}"]
    assert b"report</html>" in report
    (model,) = artifacts(server, "model")
    assert (model.name, model.metadata["trial"]) == ("ranks-adapter", "r8")
    assert model.metadata["metrics"] == {"eval_loss": 0.5}
    assert (model.aliases, model.files) == (["best", "latest"], ["weights.safetensors"])


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_the_same_sweep_later_updates_its_run(mode: str, server: FakeWandb, sweep: Path) -> None:
    record(config(mode=mode), sweep)
    wandb.teardown()  # the same command is another process, which finds a log that was written to the end
    (sweep / "r8" / "adapter" / "weights.safetensors").write_bytes(b"better")
    message = record(config(mode=mode), sweep, rows=3)
    if mode == "offline":
        sync(message)
    assert [row["sweep/trials"]["nrows"] for row in named(server, "ranks").history] == [2, 3]
    assert named(server, "ranks").summary["trials"] == 3
    assert [model.aliases for model in artifacts(server, "model")] == [[], ["best", "latest"]]


def test_the_best_adapter_is_linked_to_a_registry(server: FakeWandb, sweep: Path) -> None:
    message = record(config(), sweep, link_to="wandb-registry-model/requests")
    assert "r8 is linked to wandb-registry-model/requests" in message
    assert artifacts(server, "model")[0].links == ["wandb-registry-model/requests"]


def test_a_link_that_cannot_be_is_a_sentence(server: FakeWandb, sweep: Path) -> None:
    message = record(config(), sweep, link_to="too/many/parts/in/it")
    assert "r8 is not linked to too/many/parts/in/it: Invalid artifact path" in message
    assert named(server, "ranks").exit_code == 0
    message = record(config(mode="offline"), sweep, link_to="wandb-registry-model/requests")
    assert "W&B links nothing offline" in message


@pytest.mark.e2e
def test_a_sweep_is_recorded_offline_where_the_server_fails(server: FakeWandb, sweep: Path) -> None:
    server.fail_with = 500
    message = record(config(mode="online"), sweep)
    assert message.startswith("the sweep in W&B offline, ")
    server.fail_with = 0
    sync(message)
    assert named(server, "ranks").summary["trials"] == 2


def test_without_wandb_a_sweep_has_no_run(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record(config(method="none"), sweep) == ""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert record(config(), sweep) == "W&B off: WANDB_MODE=disabled"
    assert not (sweep / "wandb").exists()


class Failing(FakeWandb):
    """Fails from the first artifact on."""

    def ArtifactType(self, **_: Any) -> dict[str, Any]:
        self.fail_with = 500
        return super().ArtifactType()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Failing]:
    """The server that the client knows of."""
    with Failing() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", server.api_key)
        yield server


@pytest.mark.slow  # the client asks an unreachable server for 10 s each time
@pytest.mark.usefixtures("failing")
def test_an_outage_at_the_end_of_a_sweep_is_a_sentence(sweep: Path, caplog: pytest.LogCaptureFixture) -> None:
    message = record(config(finish_timeout_s=1), sweep, link_to="wandb-registry-model/requests")
    assert "r8 is not linked" in message or "no record of the adapter" in caplog.text
    assert "W&B upload not complete after 1 s" in message


@pytest.mark.slow  # as above
def test_an_outage_when_the_data_is_told_is_a_warning(run: RunDirectory, failing: Failing) -> None:
    tracker = open_tracker(config(finish_timeout_s=1), run, RESOLVED)
    tracker.use_data("data-0123", [], {})
    log(tracker, run, range(1, 4))
    tracker.finish(0)
    failing.fail_with = 0
    sync(tracker.message)
    assert failing.runs[next(iter(failing.runs))].steps == [1, 2, 3]
