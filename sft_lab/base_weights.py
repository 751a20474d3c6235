"""Whether the weights of a base model are those in its files, as Transformers itself reports when it loads them."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

# Buffers that older files hold and that are computed anew; no weights.
_COMPUTED = re.compile(
    r"(rotary_emb\.(inv_freq|(cos|sin)_cached)|(attn|attention)\.(masked_)?bias|causal_mask|position_ids)$"
)
_DRAWN = "they would be drawn at random, anew at each load"
Problem = tuple[str, str]  # level and words of a finding


def problems(loading: Mapping[str, Any], model: Any) -> dict[str, Problem]:
    """By the name of the finding, what of `from_pretrained`'s loading report makes a base another than its files.

    Args:
        loading: its missing_keys, unexpected_keys and mismatched_keys.
    """
    missing = sorted(loading.get("missing_keys", ()))
    unexpected = sorted(key for key in loading.get("unexpected_keys", ()) if not _COMPUTED.search(key))
    mismatched = sorted((key, tuple(there), tuple(here)) for key, there, here in loading.get("mismatched_keys", ()))
    found = {}
    if missing:
        told = f"{len(missing)} weights of the model are not in its files, the first is {missing[0]}: {_DRAWN}"
        others = f"; the files have others, such as {unexpected[0]}" if unexpected else ""
        found["missing_weights"] = ("error", told + others)
    elif mismatched:
        key, there, here = mismatched[0]
        told = f"{len(mismatched)} weights have another shape in the model's files, the first is {key}"
        shapes = f"({list(there)} in the files, {list(here)} by config.json)"
        found["missing_weights"] = ("error", f"{told} {shapes}: {_DRAWN}")
    if unexpected and not missing:
        inside = [key for key in unexpected if _stands_inside(key, model)]
        told = (
            f"{len(unexpected)} weights in the files are none of the model's, the first is {(inside or unexpected)[0]}"
        )
        why = ": config.json may be that of another model" if inside else ": a part that this model does not have"
        found["unexpected_weights"] = ("error" if inside else "warning", told + why)
    return found


def _stands_inside(key: str, model: Any) -> bool:
    """Whether a weight belongs to a part that the model has, such as another layer; a value head or an image tower, of
    a model of another task, stands beside it.
    """
    prefix = model.base_model_prefix
    names = {name for name, _ in model.named_modules()} - {"", prefix}
    parts = key.split(".")
    paths = [".".join(parts[:length]) for length in range(1, len(parts))]
    return any(path in names or f"{prefix}.{path}" in names for path in paths)


def refused(loading: Mapping[str, Any], model: Any, allowed: Collection[str]) -> list[str]:
    """The errors that preflight.allow does not let through, as sentences."""
    found = problems(loading, model)
    return [
        f"{told} (preflight.allow=[{name}] lets it through)"
        for name, (level, told) in found.items()
        if level == "error" and name not in allowed
    ]


def _files(folder: Path) -> list[Path]:
    """Those that Transformers reads; beside them may lie the same weights for other programs."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / shard for shard in sorted({*json.loads(index.read_text())["weight_map"].values()})]
    return []


def reported(folder: Path, model: Any) -> dict[str, Any]:
    """What loading the files of a directory would report, from their headers alone; empty where there are none.

    Transformers loads tensors without numbers, with all that it renames, joins, ties and ignores.

    Args:
        model: of the architecture, on the meta device.
    """
    from transformers.modeling_utils import load_state_dict

    files = _files(folder)
    if not files:
        return {}
    headers: dict[str, Any] = {}
    for file in files:
        headers |= load_state_dict(str(file), map_location="meta")
    try:
        _, loading = type(model).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict=headers,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except RuntimeError as error:  # experts of which some are not there cannot be joined
        first = next(line for line in str(error).splitlines() if line.strip())
        return {"missing_keys": [f"of a group that cannot be put together ({first})"]}
    return dict(loading)
