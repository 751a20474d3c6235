"""Hydra, and what is wrong with the words that it is to compose a config of.

Hydra tells the first mistake alone, and of many of them neither what was given nor what is allowed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

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

from sft_lab import checks, runs
from sft_lab.options import CONF_DIR, help_text
from sft_lab.schema import Config

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError)


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


def compose_valid(loader: ConfigLoader, overrides: Sequence[str], name: str) -> tuple[DictConfig | None, list[str]]:
    """Compose what is valid of `overrides`, and tell what is not."""
    if not any(text.startswith(("+", "~")) for text in overrides):  # those pass Hydra's own checks
        with contextlib.suppress(*COMPOSE_ERRORS):
            return hydra_compose(config_name=name, overrides=list(overrides)), []
    valid: list[str] = []
    problems: list[str] = []
    values: list[tuple[str, Override]] = []
    for text in overrides:
        problem = syntax_or_option_problem(text, loader, values)
        (problems if problem else valid).append(problem or text)
    base = _try_compose([t for t in valid if t not in {v[0] for v in values}], name, problems)
    if base is None:
        return None, problems
    OmegaConf.set_struct(base, True)
    for text, override in values:
        problem = key_problem(text, override, base)
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


def syntax_or_option_problem(text: str, loader: ConfigLoader, values: list[tuple[str, Override]]) -> str | None:
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


def key_problem(text: str, override: Override, cfg: DictConfig) -> str | None:
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
