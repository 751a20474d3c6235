"""From what was typed to a checked `Config`.

Nothing above this module knows Hydra or OmegaConf.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import version as hydra_version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from sft_lab import checks, outside, runs
from sft_lab.contradictions import contradictions
from sft_lab.errors import ConfigError
from sft_lab.options import CONF_DIR, help_text
from sft_lab.schema import Config, SweepConfig

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError)
_NOT_TRAINED = ("preflight", "sweep", "tracking")  # sections that change nothing of what comes out


# --------------------------------------------------------------------------------------------- what Hydra is told


@functools.cache
def register() -> None:
    """Tell Hydra the schema and the resolvers of conf/; may be called again."""
    schema = OmegaConf.structured(Config)
    for key in checks.OPEN:
        OmegaConf.set_struct(OmegaConf.select(schema, key), False)  # so that trainer.extra.key=value needs no `+`
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    Plugins.instance()  # which loads the launchers that are installed, and with them what they store
    for launcher in ("joblib", "ray"):  # conf/hydra/launcher/ stands in for theirs, and is not to be checked against it
        store.repo["hydra"]["launcher"].pop(f"{launcher}.yaml", None)
    OmegaConf.register_new_resolver("random_id", lambda: runs.RUN_ID, replace=True)
    OmegaConf.register_new_resolver("mul", lambda *numbers: math.prod(numbers), replace=True)
    OmegaConf.register_new_resolver("help_text", help_text, replace=True)


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


@contextlib.contextmanager
def hydra_for(conf_dir: str | Path | None = None) -> Iterator[Hydra]:
    """A Hydra of our own for a while, also inside a running one."""
    register()
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    hydra_version.setbase("1.3")
    search_path = create_config_search_path(str(CONF_DIR))
    if conf_dir:  # where hydra.main puts it
        search_path.prepend("command-line", f"file://{Path(conf_dir).resolve()}", SearchPathQuery(provider="schema"))
    try:
        yield Hydra.create_main_hydra2("sft_lab", search_path)
    finally:
        GlobalHydra.instance().hydra = outer


def compose_and_check(loader: ConfigLoader, overrides: Sequence[str], name: str) -> tuple[DictConfig | None, list[str]]:
    cfg, problems = _compose_valid(loader, overrides, name)
    if cfg is not None:  # a group or key that is wrong already is not asked what else follows from it
        wrong = {_key_of(problem) for problem in problems}
        later = [(_key_of(problem), problem) for problem in problems_of(cfg)]
        below = {key for key, _ in later if any(other.startswith(f"{key}.") for other in wrong)}
        problems += [problem for key, problem in later if not {key, key.split(".")[0]} & (wrong | below)]
    return cfg, problems


def _key_of(problem: str) -> str:
    return problem.split(" ")[0].lstrip("+~").split("=")[0]


def _compose_valid(loader: ConfigLoader, overrides: Sequence[str], name: str) -> tuple[DictConfig | None, list[str]]:
    """Compose what is valid of `overrides`, and tell what is not."""
    if not any(text.startswith(("+", "~")) for text in overrides):  # those pass Hydra's own checks
        with contextlib.suppress(*COMPOSE_ERRORS):
            return hydra_compose(config_name=name, overrides=list(overrides)), []
    valid: list[str] = []
    problems: list[str] = []
    values: list[tuple[str, Override]] = []
    for text in overrides:
        problem = _syntax_or_option_problem(text, loader, values)
        (problems if problem else valid).append(problem or text)
    base = _try_compose([t for t in valid if t not in {v[0] for v in values}], name, problems)
    if base is None:
        return None, problems
    OmegaConf.set_struct(base, True)
    for text, override in values:
        problem = _key_problem(text, override, base)
        if problem:
            problems.append(problem)
            valid.remove(text)
    return _try_compose(valid, name, problems), problems


def _try_compose(overrides: list[str], name: str, problems: list[str]) -> DictConfig | None:
    try:
        return hydra_compose(config_name=name, overrides=overrides)
    except COMPOSE_ERRORS as error:
        cause = error.__cause__ or error
        lines = [line.strip() for line in f"{error}\n{cause}".splitlines() if line.strip()]
        key = re.search(r"Key .* not in .*full_key: (\S+)", " ".join(lines))
        if key and key[1].startswith("hydra"):
            problems.append(f"{key[1]} : no such key of Hydra's (--hydra-help tells more)")
            return None
        if key:  # a config file's mistake: Hydra names the file first
            problems.append(checks.unknown_key(f"{key[1]} {lines[0].split(':')[0]}", key[1]))
            return None
        problems.append(" ".join(dict.fromkeys(lines)))
        return None


def _syntax_or_option_problem(text: str, loader: ConfigLoader, values: list[tuple[str, Override]]) -> str | None:
    """What is wrong with an override by itself; those that set a value are added to `values`."""
    try:
        override = OverridesParser.create(loader).parse_override(text)
    except HydraException as error:
        reason = str(error).strip().splitlines()[0]
        return f"{text} : cannot be read as KEY=VALUE ({reason})"
    key = override.key_or_group
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return None
    if override.is_sweep_override():
        return f"{text} : several values are a sweep (allowed: one value, or -m before them)"
    if key not in loader.list_groups(""):
        values.append((text, override))
        return None
    if override.is_delete():
        return f"{text} : cannot be deleted, every group has an option"
    options, value = loader.get_group_options(key), override.value()
    if isinstance(value, Mapping) or value in options:
        return None
    return checks.not_among(text, f"no such option of the group {key}", str(value), options)


def _key_problem(text: str, override: Override, cfg: DictConfig) -> str | None:
    """What is wrong with an override that sets a value, the key or the value's type; else it is set in `cfg`."""
    key, value = override.key_or_group, override.value()
    if checks.type_of(key) is None:
        return checks.unknown_key(text, key)
    if override.is_delete():
        return f"{text} : cannot be deleted, every key of the schema has a value"
    if key.startswith("data.sources.") and (name := key.split(".")[2]) not in cfg.data.sources:
        return f"{text} : there is no source {name} yet (allowed: 'data.sources={{{name}: {{path: FILE}}}}')"
    try:
        OmegaConf.update(cfg, key, value, merge=isinstance(value, Mapping), force_add=checks.is_open(key))
    except ValidationError:
        return f"{text} : allowed is {checks.expected(key)}"
    except ConfigKeyError as error:
        return checks.unknown_key(text, error.full_key or key)
    except OmegaConfBaseException as error:
        return f"{text} : {str(error).strip().splitlines()[0]}"
    return None


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
        found = [_syntax_or_option_problem(text, hydra.config_loader, values) for text in overrides]
    found += [_key_problem(text, override, cfg) for text, override in values]
    if problems := [problem for problem in found if problem]:
        raise ConfigError(problems)
    return to_config(cfg)


def sweep_settings(cfg: DictConfig) -> SweepConfig:
    """The `sweep` section, which is of the whole sweep and of no single trial."""
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SweepConfig), cfg.sweep))
    assert isinstance(settings, SweepConfig)
    return settings


def trial_name(config: Config) -> str:
    """A trial's name: rank and learning rate to be read, a digest of all that it trains to be told apart."""
    trained = {key: value for key, value in to_dict(config).items() if key not in _NOT_TRAINED}
    digest = hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()[:10]
    return f"{config.peft.method}-r{config.peft.r}-lr{config.trainer.learning_rate:g}-{digest}"


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
