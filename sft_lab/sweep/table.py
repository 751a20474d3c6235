"""The rows of a comparison, best first, for the terminal, for scripts and for the page alike."""

from __future__ import annotations

import math
from typing import Any

from sft_lab.sweep.differences import shown
from sft_lab.sweep.ranking import Verdict, allowed_objectives
from sft_lab.sweep.records import Comparison, Record

COSTS = ("tokens_per_s", "peak_memory_bytes", "train_s")


def metric_names(comparison: Comparison, verdict: Verdict) -> list[str]:
    """The objective, the other metrics of evaluations, and the train loss, to be seen and not to be ranked by."""
    names = [verdict.objective, *allowed_objectives(comparison.records), "train_loss"]
    return [name for name in dict.fromkeys(names) if any(name in record.metrics for record in comparison.records)]


def rows(comparison: Comparison, verdict: Verdict) -> list[dict[str, Any]]:
    """One a run: the ranked ones by rank, then the others with why; numbers that are none (nan) are None."""
    keys = comparison.keys
    ranked = [_row(record, keys) for record in verdict.ranked]
    for row, record in zip(ranked, verdict.ranked, strict=True):
        better = sum(verdict.behind(other) < verdict.behind(record) for other in verdict.ranked)
        row |= {"rank": better + 1, "behind": verdict.behind(record)}
    return ranked + [_row(record, keys) | {"why": why} for record, why in verdict.unranked]


def _row(record: Record, keys: list[str]) -> dict[str, Any]:
    return {
        "rank": None,
        "name": record.name,
        "path": str(record.path),
        "sweep": record.sweep,
        "state": record.state,
        "why": "; ".join(record.problems),
        "config": {key: record.config.get(key) for key in keys},
        "metrics": {name: _finite(value) for name, value in record.metrics.items()},
        "behind": None,
        "steps": record.steps,
        "train_s": _finite(record.train_s),
        "tokens_per_s": _finite(record.tokens_per_s),
        "peak_memory_bytes": record.peak_memory_bytes,
        "adapter_bytes": record.adapter_bytes,
        "trainable_parameters": record.trainable_parameters,
        "tokens": record.tokens,
        "pruned_at_step": record.pruned_at_step,
        "wandb_id": record.wandb_id,
        "wandb_url": record.wandb_url,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def brief(value: Any) -> str:
    """A config's value to be looked at: numbers to four digits."""
    return f"{value:.4g}" if isinstance(value, float) else shown(value)


def told(name: str, value: Any) -> str:
    """A cost or a metric with its unit, empty where there is none."""
    if value is None:
        return ""
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    if name == "train_s":
        return f"{value:.1f} s" if value < 100 else f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"
    if name == "tokens_per_s":
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
