"""From what was typed to a checked `Config`, which has nothing of Hydra and OmegaConf in it, and to its file."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft_lab import checks, outside
from sft_lab.composing import compose_valid, hydra_for, key_problem, syntax_or_option_problem
from sft_lab.contradictions import contradictions
from sft_lab.errors import ConfigError
from sft_lab.schema import Config, SweepConfig

# ------------------------------------------------------------------------------------------------------ composing


def compose(overrides: Sequence[str], conf_dir: str | Path | None = None, name: str = "config") -> DictConfig:
    """The composed config, interpolations unresolved, without Hydra's own part.

    Raises:
        ConfigError: a list of everything that is wrong with `overrides`, each naming its key.
    """
    with hydra_for(conf_dir) as hydra:
        cfg, problems = compose_and_check(hydra.config_loader, overrides, name)
    if problems:
        raise ConfigError(problems)
    assert cfg is not None
    return cfg


def compose_and_check(loader: ConfigLoader, overrides: Sequence[str], name: str) -> tuple[DictConfig | None, list[str]]:
    cfg, problems = compose_valid(loader, overrides, name)
    if cfg is not None:  # a group or key that is wrong already is not asked what else follows from it
        wrong = {_key_of(problem) for problem in problems}
        later = [(_key_of(problem), problem) for problem in problems_of(cfg)]
        below = {key for key, _ in later if any(other.startswith(f"{key}.") for other in wrong)}
        problems += [problem for key, problem in later if not {key, key.split(".")[0]} & (wrong | below)]
    return cfg, problems


def _key_of(problem: str) -> str:
    return problem.split(" ")[0].lstrip("+~").split("=")[0]


# --------------------------------------------------------------------------------------- checks of a whole config


def problems_of(cfg: DictConfig) -> list[str]:
    """Everything wrong with a composed config: unknown, missing and refused values, contradictions."""
    return _checked(cfg)[1]


def _checked(cfg: DictConfig) -> tuple[Config | None, list[str]]:
    try:
        problems = [checks.unknown_key(key, key) for key in _unknown_keys(cfg)]
        missing = sorted(k for k in OmegaConf.missing_keys(cfg) if not k.startswith("hydra"))
        problems += [_missing_message(key) for key in missing]
        if problems:
            return None, problems
        config = to_dataclasses(cfg)
    except OmegaConfBaseException as error:
        return None, [f"{error.full_key or 'config'} : {str(error).strip().splitlines()[0]}"]
    return config, checks.refused(config)


def _unknown_keys(cfg: DictConfig) -> list[str]:
    """`+key` and `++key` pass Hydra's own check; the schema has the last word."""

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for name in node:
            key = prefix + str(name)
            hint = checks.type_of(key)
            if key == "hydra":
                continue
            if hint is None:
                yield key
            elif dataclasses.is_dataclass(hint) or key == "data.sources":
                yield from walk(node[name], f"{key}.")

    return list(walk(cfg, ""))


def _missing_message(key: str) -> str:
    return f"{key}=??? : a value must be given (allowed is {checks.expected(key)})"


@functools.cache
def _schema() -> DictConfig:
    """The schema to be merged into, which copies it: making it takes as long as the merge."""
    return OmegaConf.structured(Config)


def to_dataclasses(cfg: DictConfig) -> Config:
    parts = {str(key): cfg[key] for key in cfg if key != "hydra"}  # Hydra's own part is not resolved: it takes 0.1 s
    plain: dict[str, Any] = _literal(
        {key: OmegaConf.to_container(p, resolve=True) if OmegaConf.is_config(p) else p for key, p in parts.items()}
    )
    config = OmegaConf.to_object(OmegaConf.merge(_schema(), plain))
    assert isinstance(config, Config)
    return config


# ----------------------------------------------------------------------------------------------- to dataclasses


def to_config(cfg: DictConfig, processes: Callable[[], int] = outside.processes) -> Config:
    """The checked dataclasses of a composed config, with `global_batch_size` and accumulation made to agree.

    Args:
        processes: what distributed.num_processes=0 comes to; as it is said, for a run on this machine.

    Raises:
        ConfigError: a list of everything that is wrong.
    """
    config, problems = _checked(cfg)
    if config is None or problems:
        raise ConfigError(problems)
    return _agreed(config, processes)


def _agreed(config: Config, processes: Callable[[], int]) -> Config:
    """The config with its number of processes known, and rows a step and accumulation following from each other.

    Raises:
        ConfigError: nobody says how many processes, or they cannot make up such a batch.
    """
    trainer, d = config.trainer, config.distributed
    if not d.num_processes:
        d.num_processes = processes()
        if problems := list(contradictions(config)):
            raise ConfigError(problems)
    micro = trainer.per_device_train_batch_size * d.replicas
    if trainer.global_batch_size:
        trainer.gradient_accumulation_steps = trainer.global_batch_size // micro
    trainer.global_batch_size = micro * trainer.gradient_accumulation_steps
    return config


def with_other_data(config: Config, overrides: Sequence[str]) -> Config:
    """The config with its `data` section changed as typed: data=OPTION, data.key=value.

    Raises:
        ConfigError: an override that is none of `data`, or is wrong.
    """
    other = [text for text in overrides if not text.lstrip("+~").startswith(("data=", "data."))]
    if other:
        raise ConfigError([f"{text} : only data=... and data.KEY=VALUE are taken here" for text in other])
    if any(text.startswith("data=") for text in overrides):
        data = to_config(compose(overrides)).data
    else:
        data = _changed(config, overrides).data
    other_config = dataclasses.replace(config, data=data)
    problems = checks.missing_files(other_config)
    if problems:
        raise ConfigError(problems)
    return other_config


def _changed(config: Config, overrides: Sequence[str]) -> Config:
    """The config with values set as typed; raises ConfigError as `compose` does."""
    cfg = OmegaConf.merge(_schema(), _literal(to_dict(config)))
    assert isinstance(cfg, DictConfig)
    values: list[tuple[str, Override]] = []
    with hydra_for() as hydra:
        found = [syntax_or_option_problem(text, hydra.config_loader, values) for text in overrides]
    found += [key_problem(text, override, cfg) for text, override in values]
    if problems := [problem for problem in found if problem]:
        raise ConfigError(problems)
    return to_config(cfg)


def sweep_settings(cfg: DictConfig) -> SweepConfig:
    """The `sweep` section, which is of the whole sweep and of no single trial."""
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepConfig), cfg.sweep))
    assert isinstance(settings, SweepConfig)
    return settings


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections by their dotted keys."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def load(file: Path) -> Config:
    """The frozen config of a run.

    Raises:
        ConfigError: the file does not fit this version's schema.
    """
    try:
        return to_config(OmegaConf.create(_literal(yaml.safe_load(file.read_text(encoding="utf-8")))))
    except ConfigError as error:
        raise ConfigError([f"{file}: {problem}" for problem in error.problems]) from None


def _literal(value: Any) -> Any:
    """A frozen config is resolved: what looks like an interpolation in it is text."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
