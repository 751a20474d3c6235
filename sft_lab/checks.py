"""Which keys there are, and what of a whole config is refused: values, names, contradictions.

Works on the dataclasses of `schema`; knows neither Hydra nor OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import json
import math
import typing
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from sft_lab.contradictions import FILE_KINDS, contradictions
from sft_lab.library import EXTRA_OF, OPTIMIZERS, SCHEDULERS, enum_values, field_names
from sft_lab.schema import Config, TrainerConfig

_MODELS = ("a directory with config.json", "a hub id such as ORG/NAME", "embedded:NAME")
OPEN = (  # mappings of free names
    *(f"{group}.extra" for group in EXTRA_OF),
    "chat_template.kwargs",
    "data.columns",
    "data.sources",
    "distributed.deepspeed",
)
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


# ------------------------------------------------------------------------------------------------- keys and types


@functools.cache
def _fields(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _leaves(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, hint in _fields(kind).items():
        keys += _leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return keys


def type_of(key: str) -> Any:
    """The declared type of a dotted key, None where the schema has no such key, dict for anything below `extra`."""
    kind: Any = Config
    for part in key.split("."):
        if typing.get_origin(kind) is dict:  # an entry of a name of the user's own
            kind = typing.get_args(kind)[1]
            if kind is Any:
                return dict
            continue
        if not dataclasses.is_dataclass(kind):
            return None
        kind = _fields(typing.cast(type, kind)).get(part)
    return kind


def is_open(key: str) -> bool:
    """Whether a key lies in a mapping whose entries have names of the user's own."""
    return key.startswith(tuple(f"{name}." for name in OPEN))


def unknown_key(given: str, key: str) -> str:
    """Names the nearest key beside it, else anywhere, and all that the deepest existing part of it has."""
    *above, last = key.split(".")
    parents = [above[:length] for length in range(len(above), -1, -1)]
    kinds = [(parent, type_of(".".join(parent)) if parent else Config) for parent in parents]
    parent, kind = next((parent, kind) for parent, kind in kinds if dataclasses.is_dataclass(kind))
    prefix, fields = "".join(f"{part}." for part in parent), list(_fields(typing.cast(type, kind)))
    near = (
        [prefix + name for name in difflib.get_close_matches(last, fields, n=1, cutoff=0.7)]
        or sorted((k for k in _leaves() if k.split(".")[-1] == last), key=len)[:1]
        or difflib.get_close_matches(key, _leaves(), n=1, cutoff=0.8)
    )
    return message(given, "no such key", near, f"keys of {prefix[:-1]}" if prefix else "keys", fields)


def expected(key: str) -> str:
    kind = type_of(key)
    if typing.get_origin(kind) is list:
        return "a list such as [a, b]"
    return _WORDS.get(kind, "a mapping such as {a: 1}")


def not_among(given: str, what: str, word: str, allowed: Collection[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return message(given, what, near, "allowed", sorted(allowed) or ["none yet"])


def message(given: str, what: str, near: Sequence[str], label: str, allowed: Sequence[str]) -> str:
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{given} : {what}{hint} ({label}: {', '.join(allowed)})"


# --------------------------------------------------------------------------------------- checks of a whole config


def refused(config: Config) -> list[str]:
    """Every value and name that is not allowed; where there is none, every contradiction."""
    problems = [*_refused_values(config), *_refused_names(config.trainer), *_refused_extras(config)]
    return problems or list(contradictions(config))


def _refused_values(node: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(node):
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        choices, minimum, maximum = (field.metadata.get(name) for name in ("choices", "min", "max"))
        if dataclasses.is_dataclass(value):
            yield from _refused_values(value, f"{key}.")
        elif isinstance(value, dict):
            for name, item in value.items():
                if dataclasses.is_dataclass(item):
                    yield from _refused_values(item, f"{key}.{name}.")
        elif choices and value not in choices:
            yield not_among(f"{key}={value}", "not allowed", str(value), choices)
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{key}={value} : not a finite number (allowed: a finite one)"
        elif minimum is not None and value < minimum:
            yield f"{key}={value} : too small (allowed: {minimum} {'and more' if maximum is None else f'to {maximum}'})"
        elif maximum is not None and value > maximum:
            yield f"{key}={value} : too large (allowed: {minimum} to {maximum})"


def _refused_names(trainer: TrainerConfig) -> Iterator[str]:
    """Names that Transformers lists; its source is read only for one that is not our default."""
    for key, (value, default, source) in {
        "trainer.optim": (trainer.optim, "adamw_torch", OPTIMIZERS),
        "trainer.lr_scheduler_type": (trainer.lr_scheduler_type, "cosine", SCHEDULERS),
    }.items():
        if value != default and value not in (allowed := enum_values(*source)):
            yield not_among(f"{key}={value}", "not allowed", value, allowed)


def _refused_extras(config: Config) -> Iterator[str]:
    for group, owner in EXTRA_OF.items():
        section = getattr(config, group)
        if not section.extra:
            continue
        allowed, own = field_names(owner.source), {f.name for f in dataclasses.fields(section)}
        for name, value in section.extra.items():
            given = f"{group}.extra.{name}={json.dumps(value) if isinstance(value, bool) else value}"
            if name in own or name in owner.ours:
                yield f"{given} : sft_lab sets this itself (use {owner.ours.get(name, f'{group}.{name}')})"
            elif name not in allowed:
                yield not_among(given, f"no such argument of {owner.name}", name, allowed - own - set(owner.ours))


def missing_files(config: Config) -> list[str]:
    """Files that the config names and that are not there."""
    data = config.data
    paths = {"data.path": data.path if data.source == "file" else ""}
    paths["data.eval_path"] = data.eval_path if data.source in ("file", "mixture") else ""
    paths |= {f"data.sources.{name}.path": s.path for name, s in data.sources.items() if s.source == "file"}
    problems = [_missing(key, path) for key, path in paths.items() if path]
    if config.chat_template.path and not Path(config.chat_template.path).expanduser().is_file():
        problems.append(f"chat_template.path={config.chat_template.path} : no such file (allowed: a jinja file)")
    model = config.model.path
    if (model.startswith(("/", ".", "~")) or model.count("/") > 1) and not Path(model).is_dir():  # no hub id looks so
        near = _near_names(model)
        problems.append(message(f"model.path={model}", "no such directory", near, "allowed", _MODELS))
    return [problem for problem in problems if problem]


def _missing(key: str, path: str) -> str | None:
    path = str(Path(path).expanduser())
    if Path(path).exists() or (glob.has_magic(path) and glob.glob(path, recursive=True)):  # noqa: PTH207  any root
        return None
    if glob.has_magic(path):
        return f"{key}={path} : no file matches (allowed: {FILE_KINDS})"
    return message(f"{key}={path}", "no such file", _near_names(path), "allowed", [FILE_KINDS])


def _near_names(path: str) -> list[str]:
    """What lies beside a path that is not there and has nearly its name."""
    folder = Path(path).parent
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [str(folder / name) for name in difflib.get_close_matches(Path(path).name, names, n=1)]
