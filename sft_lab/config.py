"""From what was typed to a checked `Config`: composing, and every check that needs no data and no torch.

Nothing above this module knows Hydra or OmegaConf.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import re
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import version as hydra_version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from sft_lab import runs
from sft_lab.errors import ConfigError
from sft_lab.library import EXTRA_OF, OPTIMIZERS, SCHEDULERS, enum_values, field_names
from sft_lab.schema import Config, DataConfig, SweepConfig, TrainerConfig

_PACKAGE = Path(__file__).parent
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
_QUANT_OPTION = {"bnb_4bit": "nf4", "bnb_8bit": "int8"}  # as a person types them
_FILE_KINDS = "a .jsonl, .json, .csv or .parquet file"
_LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora", "extra")
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


# --------------------------------------------------------------------------------------------- what Hydra is told


def register() -> None:
    """Tell Hydra the schema and the resolvers of conf/; may be called again."""
    schema = OmegaConf.structured(Config)
    for group in EXTRA_OF:
        OmegaConf.set_struct(schema[group].extra, False)  # so that trainer.extra.key=value needs no `+`
    ConfigStore.instance().store(name="schema", node=schema)
    OmegaConf.register_new_resolver("random_id", lambda: runs.RUN_ID, replace=True)
    OmegaConf.register_new_resolver("trial_id", _trial_id, replace=True)
    OmegaConf.register_new_resolver("help_text", help_text, replace=True)


def _trial_id(*, _root_: DictConfig) -> str:
    """A sweep trial's directory name, from what it trains and not from how it was typed."""
    own = OmegaConf.masked_copy(_root_, [str(key) for key in _root_ if key not in ("hydra", "sweep", "tracking")])
    config = _agreed(_to_dataclasses(_schema_with(own)))  # unchecked: a bad trial fails as a trial, not here
    trained = {key: value for key, value in to_dict(config).items() if key not in ("sweep", "tracking")}
    digest = hashlib.sha256(json.dumps(trained, sort_keys=True).encode()).hexdigest()[:10]
    return f"{config.peft.method}-r{config.peft.r}-lr{config.trainer.learning_rate:g}-{digest}"


def _schema_with(cfg: DictConfig) -> DictConfig:
    """A config without `sweep` and `tracking`, made complete."""
    merged = OmegaConf.merge(OmegaConf.structured(Config(sweep=SweepConfig(name="-"))), cfg)
    assert isinstance(merged, DictConfig)
    return merged


def groups(conf_dir: Path = CONF_DIR) -> dict[str, dict[str, str]]:
    """Every config group's options, each with the comment line that heads its file."""
    return {
        folder.name: {file.stem: _headline(file) for file in sorted(folder.glob("*.yaml"))}
        for folder in sorted(conf_dir.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }


def _headline(file: Path) -> str:
    comments = (line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@package")), "")


def help_text() -> str:
    """What `--help` prints: Hydra's template with our groups, options and their comments in it."""
    lines = [
        "sft_lab trains LoRA adapters for language models, with configs composed by Hydra.",
        "",
        "  python -m sft_lab [train] [GROUP=OPTION ...] [KEY=VALUE ...]     one run",
        "  python -m sft_lab -m KEY=VALUE,VALUE ...                         a sweep",
        "  python -m sft_lab resume|eval|chat RUN_DIR, env                  --help tells more of each",
        "",
        "Groups and their options",
    ]
    for group, options in groups().items():
        width = max(map(len, options), default=0)
        lines += ["", f"  {group}" + ("" if options else "  (none yet)")]
        lines += [f"    {option:<{width}}  {comment}" for option, comment in options.items()]
    lines += [
        "",
        "Keys: `--cfg job` prints every one with the value it will have; --hydra-help lists Hydra's own flags.",
    ]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------ composing


@dataclasses.dataclass
class CommandLine:
    """What of Hydra's command line concerns composing; --help and its like compose nothing of ours."""

    overrides: list[str]
    conf_dir: str | None
    name: str
    multirun: bool
    composes: bool


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    parser = get_args_parser()
    parser.prog = "sft_lab"
    args = parser.parse_args(list(argv))
    asks = args.help or args.hydra_help or args.info or args.shell_completion
    return CommandLine(args.overrides, args.config_dir, args.config_name or "config", args.multirun, not asks)


def compose(overrides: Sequence[str], conf_dir: str | Path | None = None, name: str = "config") -> DictConfig:
    """The composed config, interpolations unresolved, without Hydra's own part.

    Raises:
        ConfigError: a list of everything that is wrong with `overrides`, each naming its key.
    """
    with _hydra(conf_dir) as loader:
        cfg, problems = _compose_and_check(loader, overrides, name)
    if problems:
        raise ConfigError(problems)
    assert cfg is not None
    return cfg


def check_command_line(command: CommandLine) -> Path | None:
    """Every check of the config that can be made before Hydra creates a directory.

    Of a sweep each value is checked by itself, beside the first of all others.

    Returns:
        The directory of a single run, as it would be named now.

    Raises:
        ConfigError: a list of everything that is wrong.
    """
    if command.conf_dir and not Path(command.conf_dir).is_dir():
        raise ConfigError(f"--config-dir={command.conf_dir} : no such directory")
    problems: list[str] = []
    with _hydra(command.conf_dir) as loader:
        choices = _single_values(command.overrides, loader) if command.multirun else [command.overrides]
        for overrides in choices:
            cfg, found = _compose_and_check(loader, overrides, command.name)
            problems += found or missing_files(_to_dataclasses(cfg).data if cfg is not None else DataConfig())
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))
        if command.multirun:
            return None
        full = hydra_compose(config_name=command.name, overrides=command.overrides, return_hydra_config=True)
    return Path(OmegaConf.select(full, "hydra.run.dir"))


@contextlib.contextmanager
def _hydra(conf_dir: str | Path | None = None) -> Iterator[ConfigLoader]:
    """A Hydra of our own for a while, also inside a running one; gives its config loader."""
    register()
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    hydra_version.setbase("1.3")
    search_path = create_config_search_path(str(CONF_DIR))
    if conf_dir:  # where hydra.main puts it
        search_path.prepend("command-line", f"file://{Path(conf_dir).resolve()}", SearchPathQuery(provider="schema"))
    try:
        yield Hydra.create_main_hydra2("sft_lab", search_path).config_loader
    finally:
        GlobalHydra.instance().hydra = outer


def _compose_and_check(
    loader: ConfigLoader, overrides: Sequence[str], name: str
) -> tuple[DictConfig | None, list[str]]:
    cfg, problems = _compose_valid(loader, overrides, name)
    if cfg is not None:  # a group or key that is wrong already is not asked what else follows from it
        wrong = {_key_of(problem) for problem in problems}
        later = [(_key_of(problem), problem) for problem in problems_of(cfg)]
        problems += [problem for key, problem in later if not {key, key.split(".")[0]} & wrong]
    return cfg, problems


def _key_of(problem: str) -> str:
    return problem.split(" ")[0].lstrip("+~").split("=")[0]


def _compose_valid(loader: ConfigLoader, overrides: Sequence[str], name: str) -> tuple[DictConfig | None, list[str]]:
    """Compose what is valid of `overrides`, and tell what is not."""
    if not any(text.startswith(("+", "~")) for text in overrides):  # those pass Hydra's own checks
        with contextlib.suppress(HydraException, OmegaConfBaseException, ValueError):
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
    for text, override in values:
        problem = _key_problem(text, override, base)
        if problem:
            problems.append(problem)
            valid.remove(text)
    return _try_compose(valid, name, problems), problems


def _try_compose(overrides: list[str], name: str, problems: list[str]) -> DictConfig | None:
    try:
        return hydra_compose(config_name=name, overrides=overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = error.__cause__ or error
        lines = [line.strip() for line in f"{error}\n{cause}".splitlines() if line.strip()]
        key = re.search(r"Key .* not in .*full_key: (\S+)", " ".join(lines))
        if key:  # a config file's mistake: Hydra names the file first
            problems.append(_unknown_key(f"{key[1]} {lines[0].split(':')[0]}", key[1]))
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
    return _not_among(text, f"no such option of the group {key}", str(value), options)


def _key_problem(text: str, override: Override, cfg: DictConfig) -> str | None:
    """What is wrong with an override that sets a value: the key, or the value's type."""
    key, value = override.key_or_group, override.value()
    if _hint(key) is None:
        return _unknown_key(text, key)
    if override.is_delete():
        return f"{text} : cannot be deleted, every key of the schema has a value"
    copy = OmegaConf.create(cfg)
    OmegaConf.set_struct(copy, True)
    try:
        OmegaConf.update(copy, key, value, merge=isinstance(value, Mapping), force_add=".extra." in key)
    except ValidationError:
        return f"{text} : allowed is {_expected(key)}"
    except ConfigKeyError as error:
        return _unknown_key(text, error.full_key or key)
    except OmegaConfBaseException as error:
        return f"{text} : {str(error).strip().splitlines()[0]}"
    return None


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
            else:
                texts.append([f"{key}={v}" for v in override.sweep_string_iterator()] if swept else [text])
        except (HydraException, ValueError):
            texts.append([text])
    first = [values[0] for values in texts]
    yield first
    for place, values in enumerate(texts):
        for value in values[1:]:
            yield [*first[:place], value, *first[place + 1 :]]


# ------------------------------------------------------------------------------------------------- keys and types


def _fields(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _leaves(kind: Any = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the schema."""
    keys = []
    for name, hint in _fields(kind).items():
        keys += _leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
    return keys


def _hint(key: str) -> Any:
    """The declared type of a dotted key, None where the schema has no such key, dict for anything below `extra`."""
    hint: Any = Config
    for part in key.split("."):
        if typing.get_origin(hint) is dict:
            return dict
        if not dataclasses.is_dataclass(hint):
            return None
        hint = _fields(typing.cast(type, hint)).get(part)
    return hint


def _unknown_key(given: str, key: str) -> str:
    """Names the nearest key beside it, else anywhere, and all that the deepest existing part of it has."""
    parent, hint = "", typing.cast(Any, Config)
    for part in key.split(".")[:-1]:
        below = _fields(hint).get(part)
        if not dataclasses.is_dataclass(below):
            break
        parent, hint = f"{parent}{part}.", below
    last = key.split(".")[-1]
    near = (
        [parent + name for name in difflib.get_close_matches(last, _fields(hint), n=1, cutoff=0.7)]
        or difflib.get_close_matches(key, [k for k in _leaves() if k.split(".")[-1] == last], n=1, cutoff=0)
        or difflib.get_close_matches(key, _leaves(), n=1, cutoff=0.8)
    )
    return _message(given, "no such key", near, f"keys of {parent[:-1]}" if parent else "keys", list(_fields(hint)))


def _expected(key: str) -> str:
    hint = _hint(key)
    if typing.get_origin(hint) is list:
        return "a list such as [a, b]"
    return _WORDS.get(hint, "a mapping such as {a: 1}")


def _not_among(given: str, what: str, word: str, allowed: Collection[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return _message(given, what, near, "allowed", sorted(allowed) or ["none yet"])


def _message(given: str, what: str, near: Sequence[str], label: str, allowed: Sequence[str]) -> str:
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{given} : {what}{hint} ({label}: {', '.join(allowed)})"


# --------------------------------------------------------------------------------------- checks of a whole config


def problems_of(cfg: DictConfig) -> list[str]:
    """Everything wrong with a composed config: unknown, missing and refused values, contradictions."""
    try:
        problems = [_unknown_key(key, key) for key in _unknown_keys(cfg)]
        missing = sorted(k for k in OmegaConf.missing_keys(cfg) if not k.startswith("hydra"))
        problems += [_missing_message(key) for key in missing]
        if problems:
            return problems
        config = _to_dataclasses(cfg)
    except OmegaConfBaseException as error:
        return [f"{error.full_key or 'config'} : {str(error).strip().splitlines()[0]}"]
    problems = [*_refused_values(config), *_refused_names(config.trainer), *_refused_extras(config)]
    return problems or list(_contradictions(config))


def _unknown_keys(cfg: DictConfig) -> list[str]:
    """`+key` and `++key` pass Hydra's own check; the schema has the last word."""

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for name in node:
            key = prefix + str(name)
            hint = _hint(key)
            if key == "hydra":
                continue
            if hint is None:
                yield key
            elif dataclasses.is_dataclass(hint):
                yield from walk(node[name], f"{key}.")

    return list(walk(cfg, ""))


def _missing_message(key: str) -> str:
    return f"{key}=??? : a value must be given (allowed is {_expected(key)})"


def _to_dataclasses(cfg: DictConfig) -> Config:
    plain: dict[str, Any] = _literal(OmegaConf.to_container(cfg, resolve=True))
    plain.pop("hydra", None)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), plain))
    assert isinstance(config, Config)
    return config


def _refused_values(node: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(node):
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        choices, minimum = field.metadata.get("choices"), field.metadata.get("min")
        if dataclasses.is_dataclass(value):
            yield from _refused_values(value, f"{key}.")
        elif choices and value not in choices:
            yield _not_among(f"{key}={value}", "not allowed", str(value), choices)
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{key}={value} : not a finite number (allowed: a finite one)"
        elif minimum is not None and value < minimum:
            yield f"{key}={value} : too small (allowed: {minimum} and more)"


def _refused_names(trainer: TrainerConfig) -> Iterator[str]:
    """Names that Transformers lists; its source is read only for one that is not our default."""
    for key, (value, default, source) in {
        "trainer.optim": (trainer.optim, "adamw_torch", OPTIMIZERS),
        "trainer.lr_scheduler_type": (trainer.lr_scheduler_type, "cosine", SCHEDULERS),
    }.items():
        if value != default and value not in (allowed := enum_values(*source)):
            yield _not_among(f"{key}={value}", "not allowed", value, allowed)


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
                yield _not_among(given, f"no such argument of {owner.name}", name, allowed - own - set(owner.ours))


def _contradictions(c: Config) -> Iterator[str]:
    """What is right by itself and wrong together."""
    if c.quant.method != "none" and c.peft.method == "none":
        yield (
            f"quant={_QUANT_OPTION[c.quant.method]} with peft=none : a quantised base cannot be trained itself, it "
            "needs an adapter (allowed: quant=none, or peft=lora_r8, lora_r16, lora_r64)"
        )
    if c.peft.method == "none":
        for key in (
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "modules_to_save",
            "use_rslora",
            "use_dora",
            "extra",
        ):
            if value := getattr(c.peft, key):
                yield f"peft.{key}={value} : has no effect with peft=none (allowed: peft=lora_r16 peft.{key}={value})"
    if c.peft.method == "lora" and c.peft.r < 1:
        yield f"peft.r={c.peft.r} : too small for LoRA (allowed: 1 and more, or peft=none)"
    if c.peft.method == "lora" and not c.peft.target_modules:
        yield "peft.target_modules=[] : LoRA needs modules to adapt (allowed: [all-linear] or module names)"
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
    if c.data.source == "requests" and c.data.path:
        exists = "" if Path(c.data.path).exists() else "; there is no such file either"
        yield (
            f"data.path={c.data.path} : data=requests makes its own rows and reads no file{exists} "
            f"(allowed: data=from_file data.path={c.data.path})"
        )
    if c.data.source == "requests" and c.data.train_rows < 1:
        yield f"data.train_rows={c.data.train_rows} : data=requests is made to order (allowed: 1 and more)"
    if c.data.eval_rows > 0 and (c.data.eval_path or c.data.eval_split):
        yield (
            f"data.eval_rows={c.data.eval_rows} : rows are held out of the training rows only where there is no "
            "data.eval_path or data.eval_split (allowed: 0)"
        )


def missing_files(data: DataConfig) -> list[str]:
    """Files that `data` names and that are not there."""
    if data.source != "file":
        return []
    problems = []
    for key, path in (("data.path", data.path), ("data.eval_path", data.eval_path)):
        if path and Path(path).is_dir():
            problems.append(f"{key}={path} : is a directory (allowed: {_FILE_KINDS})")
        elif path and not Path(path).is_file():
            folder = Path(path).parent
            names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
            near = [str(folder / n) for n in difflib.get_close_matches(Path(path).name, names, n=1)]
            problems.append(_message(f"{key}={path}", "no such file", near, "allowed", [_FILE_KINDS]))
    return problems


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


# ----------------------------------------------------------------------------------------------- to dataclasses


def to_config(cfg: DictConfig) -> Config:
    """The checked dataclasses of a composed config, with `global_batch_size` and accumulation made to agree.

    Raises:
        ConfigError: a list of everything that is wrong.
    """
    problems = problems_of(cfg)
    if problems:
        raise ConfigError(problems)
    return _agreed(_to_dataclasses(cfg))


def _agreed(config: Config) -> Config:
    """The config with rows a step and accumulation following from each other."""
    trainer = config.trainer
    micro = trainer.per_device_train_batch_size * config.distributed.num_processes
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
        kept = [
            f"data.{key}={json.dumps(value, ensure_ascii=False)}"
            for key, value in dataclasses.asdict(config.data).items()
        ]
        data = to_config(compose([*kept, *overrides])).data
    problems = missing_files(data)
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(config, data=data)


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


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
