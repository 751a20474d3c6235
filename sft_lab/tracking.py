"""Where a run is tracked besides its own directory: in Weights & Biases, or by an integration of Transformers.

Tracking is a guest of the training: what goes wrong in it is a warning, once the run has begun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft_lab.runs import RunDirectory
from sft_lab.schema import TrackingConfig


class Tracker:
    """Tracks nothing; `message` is the line for the terminal that says so, and why.

    `callbacks` are the Trainer's, for a tracker that watches the training itself.
    """

    def __init__(self, message: str):
        self.message = message
        self.callbacks: list[Any] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add metrics to the row of a global step; calls for one step make one row."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Add a table to the row of a global step."""

    def html(self, name: str, page: str, step: int) -> None:
        """Add a page to the row of a global step."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's final values."""

    def use_data(self, name: str, references: Sequence[str], metadata: Mapping[str, Any]) -> None:
        """Record the data set that the run learns from, by the URIs of its parts; nothing of it is uploaded."""

    def log_adapter(self, directory: Path, name: str, metadata: Mapping[str, Any]) -> None:
        """Record the files of `directory`, which must not change any more, as an artifact of type model."""

    def finish(self, exit_code: int) -> None:
        """End the run, failed unless `exit_code` is 0. Only the first call counts."""


def require(config: TrackingConfig) -> None:
    """Refuse what could not be tracked, before anything is written.

    Raises:
        ConfigError: the tracker's package is not installed, or tracking.mode=online and there is no API key.
    """
    if config.method == "wandb" and config.mode == "online":
        from sft_lab.wandb_client import require_key

        require_key()
    elif config.method not in ("none", "wandb"):
        from sft_lab.integrations import require_package

        require_package(config.method)


def open_tracker(config: TrackingConfig, run: RunDirectory, resolved: dict[str, Any]) -> Tracker:
    """Start or continue the run in its tracker, and log what that has not got yet of metrics.jsonl.

    A killed process loses up to 15 s of what it logged, W&B's flush interval, and the resumed one starts over at a
    checkpoint: without the replay there would be a hole between them.

    Args:
        resolved: the run's whole config.

    Raises:
        ConfigError: mode=online without a usable API key.
        RunError: mode=online and the server cannot be used.
    """
    if config.method == "none":
        return Tracker("W&B off: tracking.method=none")
    if config.method != "wandb":
        from sft_lab.integrations import open_integration

        return open_integration(config, run)
    from sft_lab.wandb_run import open_wandb

    tracker = open_wandb(config, run, resolved)
    for event in run.read_metrics():
        tracker.log(flatten_event(event), step=event["step"])
    return tracker


def flatten_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an event of metrics.jsonl under the names that they have in W&B, such as train/loss."""
    return {f"{event['split']}/{key}": value for key, value in event.items() if key not in ("step", "split")}
