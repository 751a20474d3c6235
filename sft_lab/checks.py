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

from sft_lab.library import EXTRA_OF, OPTIMIZERS, SCHEDULERS, enum_values, field_names
from sft_lab.schema import Config, DataConfig, TrainerConfig

_QUANT_OPTION = {"bnb_4bit": "nf4", "bnb_8bit": "int8"}  # as a person types them
_FILE_KINDS = "a .jsonl, .json, .csv, .txt (or any of them .gz), .parquet or .arrow file, a directory of them or a glob"
_MODELS = ("a directory with config.json", "a hub id such as ORG/NAME", "embedded:NAME")
_LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora", "extra")
OPEN = (*(f"{group}.extra" for group in EXTRA_OF), "data.columns", "data.sources")  # mappings of free names
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
    return problems or list(_contradictions(config))


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


def _contradictions(c: Config) -> Iterator[str]:
    """What is right by itself and wrong together."""
    if c.quant.method != "none" and c.peft.method == "none":
        yield (
            f"quant={_QUANT_OPTION[c.quant.method]} with peft=none : a quantised base cannot be trained itself, it "
            "needs an adapter (allowed: quant=none, or peft=lora_r8, lora_r16, lora_r64)"
        )
    if c.peft.method == "none":
        for key in _LORA_KEYS:
            if value := getattr(c.peft, key):
                yield f"peft.{key}={value} : has no effect with peft=none (allowed: peft=lora_r16 peft.{key}={value})"
    if c.peft.method == "lora" and c.peft.r < 1:
        yield f"peft.r={c.peft.r} : too small for LoRA (allowed: 1 and more, or peft=none)"
    if c.peft.method == "lora" and not c.peft.target_modules:
        yield "peft.target_modules=[] : LoRA needs modules to adapt (allowed: [all-linear] or module names)"
    if not c.sweep.name.strip() or "/" in c.sweep.name or c.sweep.name in (".", ".."):
        yield f"sweep.name={c.sweep.name} : not the name of a directory (allowed: a name, without /)"
    yield from _data_contradictions(c)
    yield from _batch_contradictions(c)
    if c.trainer.max_steps == 0 or (c.trainer.max_steps < 0 and c.trainer.num_train_epochs <= 0):
        yield (
            f"trainer.max_steps={c.trainer.max_steps} : with num_train_epochs={c.trainer.num_train_epochs:g} there is "
            "nothing to train (allowed: one of them above 0)"
        )
    if c.distributed.method == "single" and c.distributed.num_processes != 1:
        yield f"distributed.num_processes={c.distributed.num_processes} : distributed=single is one (allowed: 1)"


def _data_contradictions(c: Config) -> Iterator[str]:
    yield from _source_contradictions(c.data)
    yield from _held_out_contradictions(c.data)
    if c.data.streaming and c.data.source in ("requests", "mixture"):
        yield f"data.streaming=true : not with data.source={c.data.source} (allowed: data=from_file, data=from_hub)"
    elif c.data.streaming:
        yield from _streaming_contradictions(c)
    if (c.chat_template.name == "file") != bool(c.chat_template.path):
        yield (
            f"chat_template.path={c.chat_template.path} : with chat_template.name={c.chat_template.name} "
            "(allowed: chat_template=from_file chat_template.path=FILE)"
        )


def _source_contradictions(data: DataConfig) -> Iterator[str]:
    named = {"data": data, **{f"data.sources.{name}": source for name, source in data.sources.items()}}
    for key, location in named.items():
        if location.source in ("file", "hub") and not location.path:
            yield f"{key}.path= : is empty (allowed: {_FILE_KINDS}, or a hub id)"
    if data.eval_split and data.source != "hub":
        yield f"data.eval_split={data.eval_split} : only a hub data set has splits (allowed: data.eval_path)"
    if data.eval_path and data.source == "requests":
        yield f"data.eval_path={data.eval_path} : data=requests makes its held-out rows too (allowed: data.eval_rows)"
    if data.source == "requests" and data.path:
        exists = "" if Path(data.path).exists() else "; there is no such file either"
        yield (
            f"data.path={data.path} : data=requests makes its own rows and reads no file{exists} "
            f"(allowed: data=from_file data.path={data.path})"
        )
    if data.source == "requests" and data.train_rows < 1:
        yield f"data.train_rows={data.train_rows} : data=requests is made to order (allowed: 1 and more)"
    if data.source == "mixture" and not data.sources:
        yield "data.sources={} : a mixture of nothing (allowed: {NAME: {path: FILE, weight: 0.5}, ...})"
    if data.source == "mixture" and data.path:
        yield f"data.path={data.path} : a mixture has a path for each source (allowed: data.sources.NAME.path)"
    if data.source != "mixture" and data.sources:
        yield f"data.sources={{{', '.join(data.sources)}}} : only a mixture has several (allowed: data=mixture)"
    for name, source in data.sources.items():
        if source.weight != 1.0 and data.mix == "concatenate":
            yield (
                f"data.sources.{name}.weight={source.weight:g} : has no effect with data.mix=concatenate (allowed: "
                f"data.sources.{name}.sample for a share of its rows, or data.mix=interleave_all_exhausted)"
            )
        if source.weight == 0 or source.sample == 0:
            yield f"data.sources.{name} : of weight or sample 0 (allowed: above 0, or leave the source out)"


def _held_out_contradictions(data: DataConfig) -> Iterator[str]:
    held_out = {"eval_rows": max(data.eval_rows, 0), "eval_fraction": data.eval_fraction}
    if (data.eval_path or data.eval_split) and data.source != "requests":
        for key, value in held_out.items():
            if value:
                yield (
                    f"data.{key}={value} : rows are held out of the training rows only where there is no "
                    "data.eval_path or data.eval_split (allowed: 0)"
                )
    elif all(held_out.values()):
        yield f"data.eval_fraction={data.eval_fraction} : beside data.eval_rows={data.eval_rows} (allowed: one of them)"
    if data.source == "requests" and data.eval_fraction:
        yield f"data.eval_fraction={data.eval_fraction} : data=requests is made to order (allowed: data.eval_rows)"


def _streaming_contradictions(c: Config) -> Iterator[str]:
    """What needs all rows at once cannot be had of a stream."""
    if c.trainer.max_steps < 1:
        yield (
            f"trainer.max_steps={c.trainer.max_steps} : with data.streaming=true nobody knows how many rows there are "
            "(allowed: 1 and more)"
        )
    for key, value in (
        ("data.deduplicate", c.data.deduplicate != "none" and c.data.deduplicate),
        ("data.eval_rows", c.data.eval_rows > 0 and c.data.eval_rows),
        ("data.eval_fraction", c.data.eval_fraction),
        ("data.train_rows", c.data.train_rows >= 0 and c.data.train_rows),
    ):
        if value:
            yield f"{key}={value} : needs all rows, not with data.streaming=true (allowed: leave one of them out)"
    if c.trainer.train_sampling_strategy == "group_by_length":
        yield (
            "trainer.train_sampling_strategy=group_by_length : needs all rows at once, not with data.streaming=true "
            "(allowed: auto, random, sequential)"
        )


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
        return f"{key}={path} : no file matches (allowed: {_FILE_KINDS})"
    return message(f"{key}={path}", "no such file", _near_names(path), "allowed", [_FILE_KINDS])


def _near_names(path: str) -> list[str]:
    """What lies beside a path that is not there and has nearly its name."""
    folder = Path(path).parent
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    return [str(folder / name) for name in difflib.get_close_matches(Path(path).name, names, n=1)]


def _batch_contradictions(c: Config) -> Iterator[str]:
    t, processes = c.trainer, c.distributed.num_processes
    if not t.global_batch_size:
        return
    micro = t.per_device_train_batch_size * processes
    steps, rest = divmod(t.global_batch_size, micro)
    if rest or not steps:
        yield (
            f"trainer.global_batch_size={t.global_batch_size} : not a multiple of per_device_train_batch_size x "
            f"processes={t.per_device_train_batch_size} x {processes} (allowed: {micro}, {2 * micro}, {3 * micro}, ...)"
        )
    elif t.gradient_accumulation_steps not in (1, steps):
        yield (
            f"trainer.gradient_accumulation_steps={t.gradient_accumulation_steps} : does not give "
            f"global_batch_size={t.global_batch_size} (allowed: {steps}, or leave one of the two out)"
        )
