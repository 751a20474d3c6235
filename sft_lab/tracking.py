"""The run in Weights & Biases.

We call `wandb.init` ourselves, because the Trainer's own callback logs no group and no job type, mixes the library's
config keys with ours, and never ends a run, so that a sweep's next trial would log into the last one's.

Tracking is a guest of the training: an unreachable server costs seconds at the start and at the end, never the run.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_lab import wandb_file
from sft_lab.errors import ConfigError, RunError
from sft_lab.runs import RunDirectory, write_text
from sft_lab.schema import TrackingConfig

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)


class Tracker:
    """Tracks nothing; `message` is the line for the terminal that says so, and why."""

    def __init__(self, message: str):
        self.message = message

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Add metrics to the row of a global step; calls for one step make one row."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Add a table to the row of a global step."""

    def html(self, name: str, page: str, step: int) -> None:
        """Add a page to the row of a global step."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the run's final values."""

    def log_adapter(self, directory: Path, name: str, metadata: Mapping[str, Any]) -> None:
        """Record the files of `directory`, which must not change any more, as an artifact of type model."""

    def finish(self, exit_code: int) -> None:
        """End the run, failed unless `exit_code` is 0. Only the first call counts."""


class WandbTracker(Tracker):
    """A W&B run that already holds every step up to `last_step`: those are not logged again."""

    def __init__(self, wandb_run: wandb.Run, config: TrackingConfig, last_step: int, message: str):
        super().__init__(message)
        self._run = wandb_run
        self._config = config
        self._last_step = last_step
        self._finished = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if step > self._last_step:
            self._run.log(dict(metrics), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        import wandb

        if step > self._last_step:
            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows])
            self._run.log({name: table}, step=step)

    def html(self, name: str, page: str, step: int) -> None:
        import wandb

        if step > self._last_step:
            self._run.log({name: wandb.Html(page)}, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def log_adapter(self, directory: Path, name: str, metadata: Mapping[str, Any]) -> None:
        import wandb

        if not self._config.log_adapter:
            return
        artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9._-]+", "-", name), type="model", metadata=dict(metadata))
        # Immutable and without the cache: no second and third copy of the weights under the home directory.
        artifact.add_dir(str(directory), skip_cache=True, policy="immutable")
        try:
            self._run.log_artifact(artifact)  # asks the server, for 10 s at most, whether the name is free
        except (wandb.errors.Error, ValueError) as error:
            logger.warning(f"W&B has no record of the adapter, which is in {directory}: {str(error).splitlines()[0]}")

    def finish(self, exit_code: int) -> None:
        if self._finished:
            return
        self._finished = True
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError:
            self.message = (
                f"W&B upload not complete after {self._config.finish_timeout_s} s (tracking.finish_timeout_s); "
                f"complete it: wandb sync --include-online {shlex.quote(str(Path(self._run.dir).parent))}"
            )
            logger.warning(self.message)


def open_tracker(config: TrackingConfig, run: RunDirectory, resolved: dict[str, Any], group: str = "") -> Tracker:
    """Start or continue the run's W&B run, and log what W&B has not got yet of metrics.jsonl.

    A killed process loses up to 15 s of what it logged, W&B's flush interval, and the resumed one starts over at a
    checkpoint: without the replay there would be a hole between them.

    Args:
        resolved: the run's whole config, kept under the one key `sft_lab`.
        group: the sweep's name, for a config without a group of its own.

    Raises:
        ConfigError: mode=online without a usable API key.
        RunError: mode=online and the server cannot be used.
    """
    if config.method == "none":
        return Tracker("W&B off: tracking.method=none")
    if config.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
        return Tracker("W&B off: WANDB_MODE=disabled")
    arguments = _init_arguments(config, run, resolved, group)
    tracker = _connect(config, run, arguments)
    for event in run.read_metrics():
        tracker.log(flatten_event(event), step=event["step"])
    return tracker


def flatten_event(event: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an event of metrics.jsonl under the names that they have in W&B, such as train/loss."""
    return {f"{event['split']}/{key}": value for key, value in event.items() if key not in ("step", "split")}


def _init_arguments(config: TrackingConfig, run: RunDirectory, resolved: dict[str, Any], group: str) -> dict[str, Any]:
    """All that `wandb.init` takes, but for the mode."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",  # Rich draws on it
        disable_git=True,
        save_code=False,
        init_timeout=config.init_timeout_s,
        finish_timeout=config.finish_timeout_s,
        finish_timeout_raises=True,
    )
    return {
        "project": config.project,
        "entity": config.entity or None,
        "group": config.group or group or None,
        "job_type": config.job_type,
        "name": config.name or run.path.name,
        "tags": list(config.tags),
        "notes": config.notes or None,
        "config": {"sft_lab": resolved},
        "dir": str(run.path),
        "id": _run_id(run),
        "resume": "allow",
        "settings": settings,
    }


def _run_id(run: RunDirectory) -> str:
    """The W&B run's id, which outlives the process: the resumed run is the same W&B run."""
    path = run.wandb / "run_id"
    if not path.exists():
        run.wandb.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _connect(config: TrackingConfig, run: RunDirectory, arguments: dict[str, Any]) -> WandbTracker:
    """The run online, or in mode auto offline where that cannot be; decided within init_timeout_s and 3 s more."""
    _start_session()
    if reason := _wish_for_offline(config):
        return _offline(config, run, arguments, reason)
    try:
        require_key()
        return _online(config, run, arguments)
    except (ConfigError, RunError) as error:
        if config.mode == "online":
            raise type(error)(f"tracking.mode=online, but {error}") from error
        return _offline(config, run, arguments, str(error))


def _start_session() -> None:
    """Prepare the client of this process."""
    # Its telemetry prints on our terminal and delays the exit where the server is down.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # The session's mode is not the run's, but outside mode online `wandb.login` looks for no key.
    wandb.setup(settings=wandb.Settings(silent=True, mode="online"))


def _wish_for_offline(config: TrackingConfig) -> str:
    if config.mode == "offline":
        return "tracking.mode=offline"
    if config.mode == "auto" and os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    return ""


def require_key() -> None:
    """Ask W&B for the key that it knows of: environment, netrc, its settings. The server is not asked yet."""
    import wandb

    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        raise ConfigError(str(error)) from error
    if not found:
        raise ConfigError("there is no API key: set WANDB_API_KEY or run `wandb login`")


def _online(config: TrackingConfig, run: RunDirectory, arguments: dict[str, Any]) -> WandbTracker:
    import wandb

    before = set(run.wandb.glob("run-*"))
    try:
        wandb_run = wandb.init(mode="online", **arguments)
    except (wandb.errors.Error, TimeoutError) as error:
        failure = _init_failure(error, config)
        wandb.teardown()  # the session still holds the run's id, which the offline run needs
        _start_session()
        for attempt in set(run.wandb.glob("run-*")) - before:
            shutil.rmtree(attempt)
        raise failure from error
    last_step = wandb_run.starting_step - 1 if wandb_run.resumed else -1
    return WandbTracker(wandb_run, config, last_step, f"W&B online: {wandb_run.url}")


def _init_failure(error: Exception, config: TrackingConfig) -> ConfigError | RunError:
    import wandb

    server = wandb.setup().settings.base_url
    detail = str(error).splitlines()[0]
    if "error 401" in detail:
        return ConfigError(f"{server} refuses the API key")
    if "deadline exceeded" in detail or "imed out" in detail:
        return RunError(f"{server} gave no answer within {config.init_timeout_s} s (tracking.init_timeout_s)")
    return RunError(f"{server} did not accept the run: {detail}")


def _offline(config: TrackingConfig, run: RunDirectory, arguments: dict[str, Any], reason: str) -> WandbTracker:
    import wandb

    wandb_file.repair_torn_logs(run.wandb)
    last_step = wandb_file.last_step(run.wandb)
    wandb_run = wandb.init(mode="offline", **arguments)
    message = f"W&B offline, {reason}; upload later: wandb sync {shlex.quote(str(run.wandb))}"
    return WandbTracker(wandb_run, config, last_step, message)
