"""What was typed, where it leads to a run or a sweep: checked before Hydra creates a directory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sft_lab import checks
from sft_lab.composing import COMPOSE_ERRORS, hydra_for
from sft_lab.config import compose, compose_and_check, to_config, to_dataclasses
from sft_lab.errors import ConfigError
from sft_lab.schema import Config

SWEEPERS = "hydra_plugins.sft_lab."  # where Hydra is told that our sweepers are


@dataclasses.dataclass
class CommandLine:
    """What of Hydra's command line concerns composing; --help and its like compose nothing of ours."""

    overrides: list[str]
    conf_dir: str | None
    name: str
    multirun: bool
    composes: bool
    params: list[str] = dataclasses.field(default_factory=list)  # what a sweep's file varies: hydra.sweeper.params
    leaves_out: bool = False  # sweep.on_bad_trial=skip


def parse(argv: Sequence[str]) -> CommandLine:
    parser = get_args_parser()
    parser.prog = "sft_lab"
    args = parser.parse_args(list(argv))
    if args.multirun and args.cfg:
        raise ConfigError("--cfg with -m : shows one config (allowed: --cfg, or -m with sweep.dry_run=true)")
    asks = args.help or args.hydra_help or args.info or args.shell_completion
    return CommandLine(args.overrides, args.config_dir, args.config_name or "config", args.multirun, not asks)


def check(command: CommandLine) -> Path | None:
    """Every check of the config that can be made before Hydra creates a directory.

    Of a sweep each value is checked by itself, beside the first of all others; where bad trials are to be left out,
    only what is wrong with all of them counts.

    Returns:
        The directory of a single run, as it would be named now; None for a sweep.

    Raises:
        ConfigError: a list of everything that is wrong.
    """
    if command.conf_dir and not Path(command.conf_dir).is_dir():
        raise ConfigError(f"--config-dir={command.conf_dir} : no such directory")
    with hydra_for(command.conf_dir) as hydra:
        loader = hydra.config_loader
        _read_sweep_file(hydra, command)
        typed = [*command.params, *command.overrides]
        choices = _single_values(typed, loader) if command.multirun else [command.overrides]
        found = []
        for overrides in choices:
            cfg, problems = compose_and_check(loader, overrides, command.name)
            found.append(problems or (checks.missing_files(to_dataclasses(cfg)) if cfg is not None else []))
        told = list(dict.fromkeys(itertools.chain(*found)))
        if command.leaves_out:  # what is wrong with some trials alone is told with the plan
            told = [problem for problem in told if all(problem in problems for problems in found)]
        if told:
            raise ConfigError(told)
        if command.multirun:
            return None
        full = hydra_compose(config_name=command.name, overrides=command.overrides, return_hydra_config=True)
    if OmegaConf.select(full, "hydra.output_subdir") is not None:
        raise ConfigError("hydra.output_subdir : Hydra would write a config.yaml of its own (allowed: null)")
    run_dir = OmegaConf.select(full, "hydra.run.dir")
    if not run_dir:
        raise ConfigError("hydra.run.dir= : is empty (allowed: a directory that is new or empty)")
    return Path(run_dir)


def _read_sweep_file(hydra: Hydra, command: CommandLine) -> None:
    """Add to the command what a file of multirun_examples/ says: that it is a sweep, and of what.

    Raises:
        ConfigError: the file varies something and would train a single run; or a sweeper that is none of ours.
    """
    try:
        cfg = hydra.compose_config(
            config_name=command.name,
            overrides=command.overrides,
            run_mode=RunMode.MULTIRUN,
            with_log_configuration=False,
            validate_sweep_overrides=False,
        )
    except COMPOSE_ERRORS:
        return  # told with the other problems
    sweeper = str(cfg.hydra.sweeper._target_).removeprefix(SWEEPERS)
    if command.multirun and sweeper not in ("GridSweeper", "OptunaSweeper"):
        raise ConfigError(f"hydra/sweeper : {sweeper} knows nothing of runs that go on (allowed: grid, optuna)")
    command.params = sweep_params(cfg)
    command.leaves_out = OmegaConf.select(cfg, "sweep.on_bad_trial") == "skip"
    command.multirun = command.multirun or cfg.hydra.mode == RunMode.MULTIRUN
    if command.params and not command.multirun:
        raise ConfigError(
            f"hydra.sweeper.params : {', '.join(command.params)} would be ignored, a single run varies nothing "
            "(allowed: -m, or hydra.mode=MULTIRUN in the file)"
        )


def sweep_params(cfg: DictConfig) -> list[str]:
    """The overrides under hydra.sweeper.params, as they stand: an interpolation in them is each trial's own."""
    params = OmegaConf.to_container(cfg.hydra.sweeper, resolve=False).get("params") or {}  # type: ignore[union-attr]
    return [f"{key}={value}" for key, value in params.items()]


def one_run(words: Sequence[str], verb: str) -> tuple[Config, Path]:
    """The config that `words` compose to, and the directory that a run of it would have.

    Raises:
        ConfigError: a list of everything that is wrong, or the words ask for a sweep.
    """
    command = parse(words)
    run_dir = None if command.multirun else check(command)
    if run_dir is None:
        raise ConfigError(
            f"{verb} -m : one run at a time (allowed: the overrides of one trial; or a sweep's sweep.dry_run=true)"
        )
    return to_config(compose(command.overrides, command.conf_dir, command.name)), run_dir


def _single_values(overrides: Sequence[str], loader: ConfigLoader) -> Iterator[list[str]]:
    """The first values of a sweep, then for every further value of each swept key the same with that one in place."""
    texts: list[list[str]] = []
    for text in overrides:
        try:
            override = OverridesParser.create(loader).parse_override(text)
            swept = override.is_sweep_override() and not override.key_or_group.startswith("hydra")
            key = override.get_key_element()
            value: Any = override.value()
            if isinstance(value, Glob):
                texts.append([f"{key}={name}" for name in value.filter(loader.get_group_options(key))] or [text])
            elif isinstance(value, IntervalSweep):
                texts.append([f"{key}={end}" for end in (value.start, value.end)])
            else:
                texts.append([f"{key}={v}" for v in override.sweep_string_iterator()] if swept else [text])
        except (HydraException, ValueError):
            texts.append([text])
    first = [values[0] for values in texts]
    yield first
    for place, values in enumerate(texts):
        for value in values[1:]:
            yield [*first[:place], value, *first[place + 1 :]]
