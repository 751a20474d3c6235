"""A sweep's own run in Weights & Biases, beside those of its trials: their table, the report, the best adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_lab.runs import RunDirectory
from sft_lab.schema import TrackingConfig
from sft_lab.wandb_client import first_line
from sft_lab.wandb_run import WandbTracker, open_wandb

Best = tuple[Path, str, Mapping[str, Any]]  # the adapter's directory, its trial, what to say of it


def record_sweep(
    config: TrackingConfig,
    folder: Path,
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    report: Path | None = None,
    best: Best | None = None,
    link_to: str = "",
    summary: Mapping[str, Any] | None = None,
) -> str:
    """Write down in W&B how a sweep went; the same sweep later updates the same W&B run.

    The best adapter becomes a version of the collection NAME-adapter, and takes the alias `best` from the one before.
    The sweep is complete without all this: where the server fails, the record is kept offline, and nothing is raised.

    Args:
        config: of any trial; its group, job_type and name are the sweep's here.
        folder: the sweep's directory; W&B's files go into its wandb/.
        columns, rows: a table with a row for each trial.
        report: an HTML page, complete in itself.
        link_to: where to link the best adapter, such as wandb-registry-model/COLLECTION; empty: nowhere.
        summary: the run's final values.

    Returns:
        What to tell the person; empty where the sweep is not tracked in W&B.
    """
    if config.method != "wandb":
        return ""
    own = dataclasses.replace(config, group=name, job_type="sweep", name=name)
    resolved = {"sweep": {"name": name, "trials": len(rows)}}
    tracker = open_wandb(own, RunDirectory(folder), resolved, fall_back=True)
    if not isinstance(tracker, WandbTracker):
        return tracker.message
    step = tracker.last_step + 1
    tracker.table("sweep/trials", columns, rows, step)
    if report is not None:
        tracker.html("sweep/report", report.read_text(encoding="utf-8"), step)
    tracker.summary(summary or {})
    notes = [_publish(tracker, own, name, best, link_to)] if best and config.log_adapter else []
    tracker.finish(0)
    return "; ".join(filter(None, [f"the sweep in {tracker.message}", *notes]))


def _publish(tracker: WandbTracker, config: TrackingConfig, name: str, best: Best, link_to: str) -> str:
    """Log the best trial's adapter and link it; returns what became of the link."""
    import wandb

    directory, trial, metadata = best
    artifact = tracker.log_directory(directory, f"{name}-adapter", {"trial": trial, **metadata}, aliases=["best"])
    if not link_to or artifact is None:
        return ""
    if tracker.run.offline:
        return f"{trial} is not linked to {link_to}: W&B links nothing offline; the same command does with a server"
    try:
        artifact.wait(timeout=config.finish_timeout_s)
        tracker.run.link_artifact(artifact, link_to)
    except (wandb.errors.Error, ValueError, ConnectionError) as error:
        return f"{trial} is not linked to {link_to}: {first_line(error)}"
    return f"{trial} is linked to {link_to}"
