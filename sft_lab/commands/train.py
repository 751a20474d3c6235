"""`train`, or no verb: checks what was typed, then hands over to Hydra."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sft_lab import config as configs
from sft_lab.errors import SftLabError
from sft_lab.runs import RunDirectory


def main(argv: Sequence[str]) -> int:
    command = configs.parse_command_line(argv)
    run_dir = configs.check_command_line(command) if command.composes else None
    missing = {p.resolve() for p in run_dir.parents if not p.exists()} if run_dir else set()
    failures: list[tuple[str, str]] = []

    def task(cfg: DictConfig) -> None:
        try:
            _run_one(cfg)
        except SftLabError as error:
            _discard_empty(Path(HydraConfig.get().runtime.output_dir), missing)
            if HydraConfig.get().mode == RunMode.RUN or error.exit_code > 128:
                raise _Stop(error) from error
            failures.append((Path(HydraConfig.get().runtime.output_dir).name, str(error)))
            _clear_frames(error)
            print(f"sft_lab: {failures[-1][0]} failed: {error}", file=sys.stderr)
        gc.collect()  # a Trainer and its model refer to each other

    configs.register()
    sys.argv = ["sft_lab", *argv]
    try:
        hydra.main(version_base="1.3", config_path=str(configs.CONF_DIR), config_name="config")(task)()
    except _Stop as stop:
        raise stop.error from None
    for name, error in failures:
        print(f"sft_lab: failed: {name}: {error}", file=sys.stderr)
    return 1 if failures else 0


def _clear_frames(error: BaseException | None) -> None:
    """Let go of the model that the frames of a failed trial hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__


class _Stop(SystemExit):
    """Leaves Hydra, which would print a traceback for an Exception."""

    def __init__(self, error: SftLabError):
        self.error = error
        super().__init__(error.exit_code)


def _run_one(cfg: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    config = configs.to_config(cfg)  # cfg itself: a copy would resolve ${now:} anew, for each trial another sweep.name
    if hydra_config.mode == RunMode.MULTIRUN and not config.tracking.group:
        config.tracking.group = config.sweep.name
    from sft_lab.launch import start

    start(config, RunDirectory(hydra_config.runtime.output_dir), list(hydra_config.overrides.task))


def _discard_empty(run_dir: Path, missing: set[Path]) -> None:
    """Undo the directories that Hydra made for a run that was refused before it wrote anything."""
    for folder in (run_dir, *(p for p in run_dir.parents if p in missing)):
        if any(folder.iterdir()):
            return
        folder.rmdir()
