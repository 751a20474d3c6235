"""Whether the weights of a base model are those in its files, as Transformers itself reports when it loads them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

# Buffers that older files hold and that are computed anew; no weights.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|position_ids|\.rotary_emb\.(cos|sin)_cached)$")
_DRAWN = "they would be drawn at random, anew at each load"
FINDINGS = ("missing_weights", "unexpected_weights")


def problems(loading: Mapping[str, Any]) -> dict[str, str]:
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
        found["missing_weights"] = told
        if unexpected:
            found["missing_weights"] += f"; the files have others, such as {unexpected[0]}"
    elif mismatched:
        key, there, here = mismatched[0]
        found["missing_weights"] = (
            f"{len(mismatched)} weights have another shape in the model's files, the first is {key} ({list(there)} in "
            f"the files, {list(here)} by config.json): {_DRAWN}"
        )
    if unexpected and not missing:
        found["unexpected_weights"] = (
            f"{len(unexpected)} weights in the files are none of the model's, the first is {unexpected[0]}: "
            "config.json may be that of another model"
        )
    return found


def refused(loading: Mapping[str, Any], allowed: Collection[str]) -> list[str]:
    """The problems that preflight.allow does not let through, as sentences."""
    found = problems(loading)
    return [f"{told} (preflight.allow=[{name}] lets it through)" for name, told in found.items() if name not in allowed]
