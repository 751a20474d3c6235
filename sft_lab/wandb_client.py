"""The W&B client of this process: its session, its key, which run it is to continue, and an end that never hangs."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import threading
from typing import TYPE_CHECKING, Any

import psutil

from sft_lab.errors import ConfigError
from sft_lab.runs import RunDirectory, write_text
from sft_lab.schema import TrackingConfig

if TYPE_CHECKING:
    import wandb

_GRACE_S = 16  # beyond finish_timeout_s: the client writes its log every 15 s, by then all of it is on disk


def start_session() -> None:
    """Prepare the client of this process."""
    # Its telemetry prints on our terminal and delays the exit where the server is down.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    # The session's mode is not the run's, but outside mode online `wandb.login` looks for no key.
    wandb.setup(settings=wandb.Settings(silent=True, mode="online"))


def start_session_anew() -> None:
    import wandb

    with contextlib.suppress(ConnectionError):  # of a service that is gone
        wandb.teardown()
    wandb.run = None  # such a one leaves its run behind, and with that `wandb.login` looks for no key
    start_session()


def require_key() -> None:
    """Ask W&B for the key that it knows of: environment, netrc, its settings. The server is not asked yet.

    Raises:
        ConfigError: there is none, or it has another form than keys have.
    """
    import wandb

    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        raise ConfigError(str(error)) from error
    if not found:
        raise ConfigError("there is no API key: set WANDB_API_KEY or run `wandb login`")


def place_of(config: TrackingConfig, run: RunDirectory) -> dict[str, Any]:
    """Entity, project and id of the W&B run. The id outlives the process: the resumed run is the same W&B run.

    Under `wandb agent` it is the run that the agent has made for this process to fill; the environment says which, and
    `wandb.init` takes no other then. Resumed by hand later it is still that one, in the sweep's project.
    """
    id_file, sweep_file = run.wandb / "run_id", run.wandb / "sweep"
    run.wandb.mkdir(parents=True, exist_ok=True)
    if os.environ.get("WANDB_SWEEP_ID"):
        write_text(id_file, os.environ["WANDB_RUN_ID"] + "\n")
        write_text(sweep_file, "/".join(os.environ.get(f"WANDB_{name}", "") for name in ("ENTITY", "PROJECT")) + "\n")
        return {}
    if not id_file.exists():
        write_text(id_file, secrets.token_hex(4) + "\n")
    entity, project = config.entity, config.project
    if sweep_file.exists():
        entity, project = sweep_file.read_text(encoding="utf-8").strip().split("/")
    return {"entity": entity or None, "project": project, "id": id_file.read_text(encoding="utf-8").strip()}


def finish(wandb_run: wandb.Run, exit_code: int, timeout_s: int) -> None:
    """End the run in the client; with the client's service, where its own timeout does not end it.

    It doesn't while an artifact is on its way to a server that fails: then `finish` waits for as long as that lasts.

    Args:
        timeout_s: the run's finish_timeout.

    Raises:
        TimeoutError: not everything was uploaded. It is on disk.
    """
    done: concurrent.futures.Future[None] = concurrent.futures.Future()

    def end() -> None:
        try:
            done.set_result(wandb_run.finish(exit_code=exit_code))
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=end, daemon=True).start()
    try:
        done.result(timeout_s + _GRACE_S)
    except TimeoutError:
        if not done.done():
            for process in psutil.Process().children():
                if process.name() == "wandb-core":
                    process.kill()
                    process.wait()
            start_session_anew()
        raise


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
