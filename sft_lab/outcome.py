"""What a run comes to: result.json, and the same beside the team's other runs."""

from __future__ import annotations

import contextlib
import json
import resource
from pathlib import Path
from typing import Any

from sft_lab import config as configs
from sft_lab import console, ranks, tracking
from sft_lab.callbacks import Metrics
from sft_lab.data.prepared import Prepared
from sft_lab.runs import RunDirectory, read_json, write_json
from sft_lab.schema import Config


def record(
    config: Config, run: RunDirectory, trainer: Any, metrics: Metrics, evaluated: dict[str, float]
) -> dict[str, Any]:
    tokens, peak = metrics.counter.total() if metrics.counter else 0, max(ranks.gathered(_peak_memory_bytes()))
    if not ranks.leads():
        return {}
    last = [event for event in run.read_metrics() if event["split"] == "train"][-1]
    train_s = metrics.trained_s
    result = {
        "metrics": {"train_loss": last["loss"], **evaluated},
        "train_s": round(train_s, 3),
        "tokens_per_s": round(tokens / train_s, 1),
        "peak_memory_bytes": peak,  # of the rank that held most
        "predicted_peak_memory_bytes": read_json(run.preflight)["memory"],
        "steps": trainer.state.global_step,
        "adapter_bytes": sum(f.stat().st_size for f in run.adapter.glob("*.safetensors")),
    }
    write_json(run.result, result)
    console.say(
        f"trained {result['steps']} steps in {train_s:.0f} s, {result['tokens_per_s']:.0f} tokens/s; "
        f"adapter of {result['adapter_bytes'] / 1e6:.1f} MB in {run.adapter}"
    )
    return result


def track(config: Config, run: RunDirectory, tracker: tracking.Tracker, result: dict[str, Any], data: Prepared) -> None:
    """The run's summary, samples and adapter, beside the team's other runs."""
    report = read_json(run.preflight)
    facts = {f"preflight/{name}": report[name] for name in ("steps", "tokens_per_step", "eval_rows", "disk_bytes")}
    for group in ("tokens", "parameters", "rows"):
        facts |= {f"preflight/{group}/{name}": n for name, n in report[group].items() if isinstance(n, (int, float))}
    tracker.summary({**facts, **{name: v for name, v in result.items() if name != "metrics"}, **result["metrics"]})
    columns = ["id", "prompt", "reference", "answer_before", "answer"]
    if run.samples.exists():
        samples = [json.loads(line) for line in run.samples.read_text(encoding="utf-8").splitlines()]
        tracker.table("samples", columns, [[sample[c] for c in columns] for sample in samples], result["steps"])
    metadata = {
        "base_model": config.model.path,
        "data_fingerprint": data.facts["data_fingerprint"],
        "config": configs.to_dict(config),
        "metrics": result["metrics"],
    }
    tracker.log_adapter(run.adapter, f"{run.path.name}-adapter", metadata)


def forget_peak_memory() -> None:
    """Begin a run's peak anew: a sweep's trials are of one process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not on Linux, or /proc is closed: the peak is then that of all trials so far
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory_bytes() -> int:
    """The most the run held: of GPU memory where there is one, else of the process's resident memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
