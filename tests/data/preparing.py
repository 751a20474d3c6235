"""Data prepared for a test: the config is composed once, since that takes ten times as long as preparing a few rows."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sft_lab import config as configs
from sft_lab.data.prepare import prepare
from sft_lab.data.prepared import Prepared
from sft_lab.errors import PreflightError
from sft_lab.schema import Config, SourceConfig

_SOURCES = {"from_file": "data.path=x", "mixture": "data.sources={x: {path: x}}", "requests": "data.train_rows=16"}


@functools.cache
def _composed(data: str) -> Config:
    return configs.to_config(configs.compose(["model=tiny_llama", "tracking=none", f"data={data}", _SOURCES[data]]))


def config_of(
    *overrides: str, data: str = "from_file", sources: Mapping[str, Mapping[str, Any]] | None = None
) -> Config:
    """A config for tiny_llama; `overrides` are KEY=VALUE, and no key follows from another one."""
    config = copy.deepcopy(_composed(data))
    for override in overrides:
        key, _, value = override.partition("=")
        *above, name = key.split(".")
        section = functools.reduce(getattr, above, config)
        assert hasattr(section, name), key
        setattr(section, name, yaml.safe_load(value))
    if sources is not None:
        config.data.sources = {name: SourceConfig(**settings) for name, settings in sources.items()}
    return config


def written(path: Path, rows: Iterable[Any]) -> Path:
    """The rows as JSON lines; one that is a text stands in the file as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def prepared_from(path: Path, *overrides: str) -> Prepared:
    return prepare(config_of(f"data.path={path}", *overrides))


def problems_of(config: Config) -> list[str]:
    """What a preparation that must fail says."""
    try:
        data = prepare(config)
    except PreflightError as error:
        return error.problems
    raise AssertionError(f"{len(data.train)} rows were prepared")


def numbers(dataset: Any) -> list[int]:
    """Where in its file each row stands."""
    return list(dataset["number"])


def names(data: Prepared) -> list[str]:
    """The name of each training row without the folder."""
    return [Path(data.row_id(row)).name for row in data.train.select_columns(["place", "number", "part"])]
