"""Which modules and weights of a model the names in `peft` mean, which they miss, and which weights get no adapter."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from sft_lab.schema import PeftConfig

_LAYER = re.compile(r"\.\d+\.")
_NO_MATRIX = re.compile(r"\.(lora_|modules_to_save)|bias$")


def problems(peft: PeftConfig, model: Any) -> list[str]:
    """Every name that matches nothing of the base model, by its key, with what exists.

    Args:
        model: the base without an adapter; on the meta device is enough.
    """
    modules = [name for name, _ in model.named_modules() if name]
    parameters = [name for name, _ in model.named_parameters()]
    adaptable = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_adaptable(module)})
    leaves = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdecimal()})
    weights = sorted({_without_layers(name) for name in parameters})
    extra = peft.extra
    targets = [] if peft.target_modules == ["all-linear"] else peft.target_modules
    excluded = extra.get("exclude_modules") or []
    tokens = extra.get("trainable_token_indices")
    found = [
        *_unmatched("peft.target_modules", targets, modules, adaptable),
        *_unmatched("peft.modules_to_save", peft.modules_to_save, modules, leaves),
        *_unmatched("peft.extra.target_parameters", _names(extra.get("target_parameters")), parameters, weights),
        *_patterns("peft.extra.rank_pattern", extra.get("rank_pattern") or {}, modules + parameters, adaptable),
        *_patterns("peft.extra.alpha_pattern", extra.get("alpha_pattern") or {}, modules + parameters, adaptable),
        *_unmatched("peft.extra.trainable_token_indices", tokens if isinstance(tokens, dict) else [], modules, leaves),
        *_layers(peft, modules),
    ]
    if isinstance(excluded, str):
        found += _patterns("peft.extra.exclude_modules", [excluded], modules, adaptable)
    else:
        found += _unmatched("peft.extra.exclude_modules", excluded, modules, leaves)
    return found


def without_effect(peft: PeftConfig, model: Any) -> list[str]:
    """Names that match something of the base and nothing that has an adapter.

    Args:
        model: the base with the adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    adapted += [f"{name}.{m.parameter_name}" for name, m in model.named_modules() if hasattr(m, "parameter_name")]
    leaves = sorted({name.rpartition(".")[2] for name in adapted if name.rpartition(".")[2] != "base_layer"})
    targets = [] if peft.target_modules == ["all-linear"] else peft.target_modules
    found = [problem for name in targets for problem in _unmatched("peft.target_modules", [name], adapted, leaves)]
    for key in ("rank_pattern", "alpha_pattern"):
        found += _patterns(f"peft.extra.{key}", peft.extra.get(key) or {}, adapted, leaves)
    return [problem.replace("no module of this model", "nothing that gets an adapter") for problem in found]


def _names(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or [])


def _is_adaptable(module: Any) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D))


def _unmatched(key: str, names: Iterable[str], there: list[str], allowed: list[str]) -> Iterator[str]:
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in there):
            yield _told(key, name, allowed)


def _patterns(key: str, patterns: Iterable[str], there: list[str], allowed: list[str]) -> Iterator[str]:
    for pattern in patterns:
        try:
            matches = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            yield f"{key} : {pattern} is no regular expression ({error})"
            continue
        if not any(matches.match(full) for full in there):
            yield _told(key, pattern, allowed)


def _layers(peft: PeftConfig, modules: list[str]) -> Iterator[str]:
    asked, pattern = peft.extra.get("layers_to_transform"), peft.extra.get("layers_pattern")
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])
    numbered = [match for match in (re.fullmatch(r"(?:.*\.)?(\w+)\.(\d+)", name) for name in modules) if match]
    for name in patterns:
        if not any(match[1] == name for match in numbered):
            yield _told("peft.extra.layers_pattern", name, sorted({match[1] for match in numbered}))
    there = {int(match[2]) for match in numbered if not patterns or match[1] in patterns}
    for index in [asked] if isinstance(asked, int) else list(asked or []):
        if index not in there:
            last = max(there, default=-1)
            yield f"peft.extra.layers_to_transform : there is no layer {index} (allowed: 0 to {last})"


def _told(key: str, name: str, allowed: list[str]) -> str:
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{key} : {name} matches no module of this model (allowed: {', '.join(allowed[:20])}{hint})"


# --------------------------------------------------------------------------------------------------- what is left out


def without_adapter(model: Any) -> tuple[dict[str, int], int]:
    """The weight matrices that no adapter changes, by name with layer numbers left out, and the size of all matrices.

    Embeddings and the head are not counted. `model` has its adapter on it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    covered: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            name = getattr(module, "parameter_name", None)  # of an adapter on one of a module's parameters
            base = module.get_base_layer()
            covered |= {id(getattr(base, name))} if name else {id(p) for p in base.parameters(recurse=False)}
        elif isinstance(module, ModulesToSaveWrapper):
            covered |= {id(p) for p in module.parameters()}
    left: dict[str, int] = defaultdict(int)
    total = 0
    for name, parameter in matrices(model.get_base_model()):
        total += parameter.numel()
        if id(parameter) not in covered and not parameter.requires_grad:
            left[_without_layers(name.replace(".base_layer", ""))] += parameter.numel()
    return dict(left), total


def matrices(model: Any) -> Iterator[tuple[str, Any]]:
    """The weights that multiply: neither vectors, nor embeddings, nor the head, nor what an adapter brings."""
    from torch import nn

    head = model.get_output_embeddings()
    aside = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    aside |= {id(p) for p in head.parameters()} if head is not None else set()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in aside and not _NO_MATRIX.search(name):
            yield name, parameter


def unquantised(model: Any, skipped: Iterable[str]) -> tuple[dict[str, int], int]:
    """The weight matrices that bitsandbytes leaves as they are, since it replaces linear layers alone; and all of them.

    Args:
        skipped: names of modules that are left out besides.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    skipped = list(skipped)
    linear = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(name == s or f"{s}." in f"{name}." for s in skipped)
    }
    left: dict[str, int] = defaultdict(int)
    total = 0
    for name, parameter in matrices(model):
        total += parameter.numel()
        if id(parameter) not in linear:
            left[_without_layers(name)] += parameter.numel()
    return dict(left), total


def _without_layers(name: str) -> str:
    """A parameter's name behind its layer's number, as target_parameters takes it."""
    return _LAYER.split(name, maxsplit=1)[-1]


def shares(left: dict[str, int], total: int, most: int = 4) -> str:
    """Names with their share of all matrices, the largest first."""
    ordered = sorted(left.items(), key=lambda item: -item[1])
    told = [f"{name} ({size / total:.0%})" for name, size in ordered[:most]]
    return ", ".join(told) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
