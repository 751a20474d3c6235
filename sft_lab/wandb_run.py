"""A run in Weights & Biases.

We call `wandb.init` ourselves, because the Trainer's own callback logs no group and no job type, mixes the library's
config keys with ours, and never ends a run, so that a sweep's next trial would log into the last one's.

Tracking is a guest of the training: an unreachable server costs seconds at the start and at the end, never the run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from sft_lab import wandb_client, wandb_file
from sft_lab.errors import ConfigError, RunError
from sft_lab.runs import RunDirectory, write_text
from sft_lab.schema import TrackingConfig
from sft_lab.tracking import Tracker
from sft_lab.wandb_client import first_line, place_of, require_key, start_session, start_session_anew

if TYPE_CHECKING:
    import wandb

logger = logging.getLogger(__name__)

_TAG_CHARACTERS = 64  # the client refuses a longer tag


class WandbTracker(Tracker):
    """A W&B run that already holds every step up to `last_step`: those are not logged again."""

    def __init__(self, wandb_run: wandb.Run, config: TrackingConfig, last_step: int, message: str):
        super().__init__(message)
        self.run = wandb_run
        self.last_step = last_step
        self._config = config
        self._lost = False  # the client's service, a process of its own
        self._finished = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._log(dict(metrics), step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        import wandb

        self._log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}, step)

    def html(self, name: str, page: str, step: int) -> None:
        import wandb

        self._log({name: wandb.Html(page, data_is_not_path=True)}, step)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step > self.last_step:
            with self._surviving():
                self.run.log(values, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        with self._surviving():
            self.run.summary.update(dict(values))

    def use_data(self, name: str, references: Sequence[str], metadata: Mapping[str, Any]) -> None:
        import wandb

        if not self._config.log_data:
            return
        with self._surviving(), self._told_of_refusal("the data set"):
            artifact = wandb.Artifact(artifact_name(name), type="dataset", metadata=dict(metadata))
            for uri in references:  # the checksum is our own fingerprint, nothing is read again
                artifact.add_reference(uri, name=unquote(urlsplit(uri).path).lstrip("/"), checksum=False)
            # What `use_artifact` does with an artifact that is not logged yet, but for waiting without end where the
            # server does not answer; and it works offline, where `use_artifact` is refused.
            self.run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def log_adapter(self, directory: Path, name: str, metadata: Mapping[str, Any]) -> None:
        if self._config.log_adapter:
            self.log_directory(directory, name, metadata)

    def log_directory(
        self, directory: Path, name: str, metadata: Mapping[str, Any], aliases: Sequence[str] = ()
    ) -> wandb.Artifact | None:
        """An artifact of type model; None where W&B has no record of it, which a warning says."""
        import wandb

        artifact = wandb.Artifact(artifact_name(name), type="model", metadata=dict(metadata))
        logged: wandb.Artifact | None = None
        with self._surviving(), self._told_of_refusal(f"the adapter, which is in {directory}"):
            # Immutable and without the cache: no second and third copy of the weights under the home directory.
            artifact.add_dir(str(directory), skip_cache=True, policy="immutable")
            self.run.log_artifact(artifact, aliases=list(aliases))  # asks the server, for 10 s at most, about the name
            logged = artifact
        return logged

    @contextlib.contextmanager
    def _told_of_refusal(self, what: str) -> Iterator[None]:
        import wandb

        try:
            yield
        except (wandb.errors.Error, ValueError) as error:
            logger.warning(f"W&B has no record of {what}: {first_line(error)}")

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Training goes on where the client's service has died; one warning says so."""
        try:
            yield
        except ConnectionError:
            if not self._lost:
                logger.warning(
                    "W&B: the client's service ended, nothing more is logged there; the run directory has it all"
                )
            self._lost = True

    def finish(self, exit_code: int) -> None:
        if self._finished:
            return
        self._finished = True
        folder = shlex.quote(str(Path(self.run.dir).parent))
        try:
            with self._surviving():
                wandb_client.finish(self.run, exit_code, self._config.finish_timeout_s)
        except TimeoutError:
            self.message = (
                f"W&B upload not complete after {self._config.finish_timeout_s} s (tracking.finish_timeout_s); "
                f"complete it: wandb sync --include-online {folder}"
            )
            logger.warning(self.message)
        if self._lost:
            self.message = f"W&B: the client's service ended early; upload what it wrote: wandb sync {folder}"
            start_session_anew()


def artifact_name(text: str) -> str:
    """`text` with what W&B allows in an artifact's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:128]


def open_wandb(
    config: TrackingConfig, run: RunDirectory, resolved: Mapping[str, Any], fall_back: bool = False
) -> Tracker:
    """The run online, or offline where that is asked for or, in mode auto, where the server cannot be used.

    Decided within init_timeout_s and 3 s more.

    Args:
        resolved: kept in the run's config under the one key `sft_lab`.
        fall_back: go offline in mode online too.

    Raises:
        ConfigError: mode=online without a usable API key.
        RunError: mode=online and the server cannot be used.
    """
    if config.mode == "auto" and os.environ.get("WANDB_MODE") == "disabled":
        return Tracker("W&B off: WANDB_MODE=disabled")
    arguments = _init_arguments(config, run, resolved)
    start_session()
    if reason := _wish_for_offline(config):
        return _offline(config, run, arguments, reason)
    try:
        require_key()
        return _online(config, run, arguments)
    except (ConfigError, RunError) as error:
        if config.mode == "online" and not fall_back:
            raise type(error)(f"tracking.mode=online, but {error}") from error
        return _offline(config, run, arguments, str(error))


def _init_arguments(config: TrackingConfig, run: RunDirectory, resolved: Mapping[str, Any]) -> dict[str, Any]:
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
        **place_of(config, run),
        "group": config.group or None,
        "job_type": config.job_type,
        "name": config.name or run.path.name,
        "tags": list(dict.fromkeys(tag[:_TAG_CHARACTERS] for tag in config.tags if tag)),
        "notes": config.notes or None,
        "config": {"sft_lab": dict(resolved)},
        "dir": str(run.path),
        "resume": "allow",
        "settings": settings,
    }


def _wish_for_offline(config: TrackingConfig) -> str:
    if config.mode == "offline":
        return "tracking.mode=offline"
    if config.mode == "auto" and os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    return ""


def _online(config: TrackingConfig, run: RunDirectory, arguments: dict[str, Any]) -> WandbTracker:
    import wandb

    before = set(run.wandb.glob("run-*"))
    try:
        wandb_run = wandb.init(mode="online", **arguments)
    except (wandb.errors.Error, TimeoutError) as error:
        failure = _init_failure(error, config)
        start_session_anew()  # the old one still holds the run's id, which the offline run needs
        for attempt in set(run.wandb.glob("run-*")) - before:
            shutil.rmtree(attempt)
        raise failure from error
    last_step = wandb_run.starting_step - 1 if wandb_run.resumed else -1
    write_text(run.wandb / "url", f"{wandb_run.url}\n")
    return WandbTracker(wandb_run, config, last_step, f"W&B online: {wandb_run.url}")


def _init_failure(error: Exception, config: TrackingConfig) -> ConfigError | RunError:
    import wandb

    server = wandb.setup().settings.base_url
    detail = first_line(error)
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
