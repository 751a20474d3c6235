"""TensorBoard, Trackio and MLflow, through the callbacks that Transformers has for them.

Such a callback logs what the Trainer logs. What it leaves to others is done here: where the files lie, that a run of
ours is one run there, and that it ends however training ends. The callbacks are given to the Trainer as they are;
named in `report_to` they would be out of reach once training fails.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sft_lab.errors import ConfigError, RunError
from sft_lab.runs import RunDirectory, write_text
from sft_lab.schema import TrackingConfig
from sft_lab.tracking import Tracker

logger = logging.getLogger(__name__)

_PACKAGES = {"tensorboard": ["tensorboard"], "trackio": ["trackio"], "mlflow": ["mlflow"]}
_DATABASE = ["sqlalchemy", "alembic"]  # what MLflow's client needs besides itself for a file of its own
_LACKING = "data lineage, samples and the adapter are in the run directory only"


def require_package(method: str) -> None:
    """
    Raises:
        ConfigError: what the tracker needs is not installed.
    """
    own_file = method == "mlflow" and "MLFLOW_TRACKING_URI" not in os.environ
    names = _PACKAGES[method] + (_DATABASE if own_file else [])
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"tracking.method={method} : the package {missing[0]} is not installed (pip install 'sft-lab[{method}]')"
        )


def open_integration(config: TrackingConfig, run: RunDirectory) -> Tracker:
    """
    Raises:
        ConfigError: what the tracker needs is not installed.
        RunError: the server that MLFLOW_TRACKING_URI names cannot be used.
    """
    require_package(config.method)
    return {"tensorboard": TensorBoard, "trackio": Trackio, "mlflow": MLflow}[config.method](config, run)


def run_name(config: TrackingConfig, run: RunDirectory) -> str:
    """A run's name where there are no groups: a sweep's name stands before that of its trial."""
    return "-".join(filter(None, [config.group, config.name or run.path.name]))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The final values that are numbers, under names of their own: the callbacks log a train_loss too."""
    return {f"final/{name}": float(value) for name, value in values.items() if isinstance(value, (int, float))}


def _quoted(word: str | Path) -> str:
    return shlex.quote(str(word))


class TensorBoard(Tracker):
    """Event files in RUN/tensorboard; a resumed run adds one."""

    def __init__(self, config: TrackingConfig, run: RunDirectory):
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        folder = run.path / "tensorboard"
        super().__init__(
            f"TensorBoard: {folder}; see it beside its neighbours: tensorboard --logdir {_quoted(run.path.parent)}; "
            f"it knows no groups, tags and notes, and {_LACKING}"
        )
        self._open_writer = lambda: SummaryWriter(str(folder))
        self._callback = TensorBoardCallback(self._open_writer())
        self._callback.logging_dir = str(folder)  # of the writer that it opens for what comes after training
        self.callbacks = [self._callback]

    def summary(self, values: Mapping[str, Any]) -> None:
        with self._open_writer() as writer:
            for name, value in _numbers(values).items():
                writer.add_scalar(name, value, values.get("steps", 0))

    def finish(self, exit_code: int) -> None:
        if self._callback.tb_writer is not None:
            self._callback.tb_writer.close()
            self._callback.tb_writer = None


class Trackio(Tracker):
    """A run in the database of TRACKIO_DIR, or of the directory that the run's own lies in."""

    def __init__(self, config: TrackingConfig, run: RunDirectory):
        folder = Path(os.environ.setdefault("TRACKIO_DIR", str(run.path.parent / "trackio")))  # read on import
        import trackio
        from transformers.integrations import TrackioCallback

        super().__init__(
            f"Trackio: {folder}; see it: TRACKIO_DIR={_quoted(folder)} trackio show "
            f"--project {_quoted(config.project)}; it has no tags, notes and failed state here, and {_LACKING}"
        )
        self._trackio = trackio
        self._arguments = {"project": config.project, "name": run_name(config, run), "resume": "allow"}
        self.callbacks = [TrackioCallback()]

    def summary(self, values: Mapping[str, Any]) -> None:
        if self._trackio.context_vars.current_run.get() is None:  # the callback ended it with training
            self._trackio.init(**self._arguments, embed=False)
        self._trackio.log(_numbers(values))

    def finish(self, exit_code: int) -> None:
        if self._trackio.context_vars.current_run.get() is not None:
            self._trackio.finish()


class MLflow(Tracker):
    """A run of the experiment `tracking.project`, on the server of MLFLOW_TRACKING_URI or in a file beside the run."""

    def __init__(self, config: TrackingConfig, run: RunDirectory):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would call home on import
        import mlflow
        from transformers.integrations import MLflowCallback

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.path.parent / 'mlflow.db'}"
        super().__init__(
            f"MLflow: {uri}, experiment {config.project}; see it: mlflow ui --backend-store-uri {_quoted(uri)}; "
            f"{_LACKING}"
        )
        self._mlflow = mlflow
        mlflow.set_tracking_uri(uri)
        try:
            self._start(config, run)
        except mlflow.exceptions.MlflowException as error:
            raise RunError(f"tracking.method=mlflow : {uri}: {str(error).splitlines()[0]}") from error
        self.callbacks = [MLflowCallback()]  # logs into the run that is active and leaves its end to us

    def _start(self, config: TrackingConfig, run: RunDirectory) -> None:
        """A new run, or that of the process which stopped."""
        self._mlflow.set_experiment(config.project)
        kept = run.path / "mlflow_run_id"
        if kept.exists():
            self._mlflow.start_run(run_id=kept.read_text(encoding="utf-8").strip())
            return
        tags = {"group": config.group, "job_type": config.job_type, "tags": ",".join(config.tags)}
        started = self._mlflow.start_run(
            run_name=config.name or run.path.name,
            tags={name: text for name, text in tags.items() if text},
            description=config.notes or None,
        )
        write_text(kept, started.info.run_id + "\n")

    def summary(self, values: Mapping[str, Any]) -> None:
        try:
            self._mlflow.log_metrics(_numbers(values), step=values.get("steps", 0))
        except self._mlflow.exceptions.MlflowException as error:  # its server may have gone since the start
            logger.warning(f"MLflow has no record of the final metrics: {str(error).splitlines()[0]}")

    def finish(self, exit_code: int) -> None:
        if self._mlflow.active_run() is not None:
            self._mlflow.end_run("FINISHED" if exit_code == 0 else "KILLED" if exit_code > 128 else "FAILED")
