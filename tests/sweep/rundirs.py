"""Run directories as a training leaves them, written without one."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sft_lab.schema import Config, DataConfig, ModelConfig, SweepConfig


def config_of(changes: dict[str, Any]) -> dict[str, Any]:
    """A complete config with dotted keys changed; data.seed follows seed as it does in conf/."""
    config = dataclasses.asdict(
        Config(
            model=ModelConfig(path="embedded:tiny_llama"),
            data=DataConfig(path="", source="requests"),
            sweep=SweepConfig(name="little"),
        )
    )
    follows = {"data.seed": changes["seed"]} if "seed" in changes else {}
    for key, value in (follows | changes).items():
        *sections, last = key.split(".")
        node = config
        for section in sections:
            node = node[section]
        node[last] = value
    return config


def write_run(
    path: Path,
    changes: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    *,
    state: str = "completed",
    status: dict[str, Any] | None = None,
    curve: Sequence[float] = (2.0, 1.5, 1.2, 1.0),
    samples: Sequence[dict[str, Any]] = (),
) -> Path:
    """One run directory; `metrics` beside a train loss, none for a run that did not come to an evaluation."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(config_of(changes or {}), sort_keys=False))
    told = {"state": state, "error": None, "step": len(curve) * 10} | (status or {})
    (path / "status.json").write_text(json.dumps(told))
    (path / "preflight.json").write_text(json.dumps({"ok": True, "parameters": {"total": 232000, "trainable": 32768}}))
    (path / "train.log").write_text("what was logged\n")
    events: list[dict[str, Any]] = []
    for i, loss in enumerate(curve):
        step = (i + 1) * 10
        events.append({"step": step, "split": "train", "loss": loss, "tokens": step * 100, "time_s": step * 0.1})
        if i % 2:
            events.append({"step": step, "split": "eval", "loss": loss + 0.1, "exact_match": 1 / (1 + loss)})
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if state == "completed":
        result = {
            "metrics": {"train_loss": curve[-1], **({"eval_loss": 1.0} if metrics is None else metrics)},
            "train_s": 12.5,
            "tokens_per_s": 25000.0,
            "peak_memory_bytes": 600 * 2**20,
            "predicted_peak_memory_bytes": None,
            "steps": len(curve) * 10,
            "adapter_bytes": 134616,
        }
        (path / "result.json").write_text(json.dumps(result))
        (path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def write_ledger(sweep: Path, **fields: Any) -> Path:
    ledger = {"name": sweep.name, "objective": "eval_loss", "direction": "minimize", "sampler": None, "left_out": []}
    trials = {child.name: {"overrides": [], "note": ""} for child in sweep.iterdir() if child.is_dir()}
    (sweep / "sweep.json").write_text(json.dumps(ledger | {"trials": trials} | fields))
    return sweep


def write_search(sweep: Path, trials: int, steps: int = 60) -> Path:
    """A search as a sampler makes it: log-uniform learning rate, rank with alpha, packing, dropout; some trials fail."""
    draw = random.Random(7)
    for number in range(trials):
        rank = draw.choice([4, 8, 16, 32])
        rate = 10 ** draw.uniform(-5, -2)
        changes = {
            "seed": draw.choice([1, 2, 3]),
            "peft.r": rank,
            "peft.lora_alpha": 2 * rank,
            "peft.lora_dropout": round(draw.uniform(0, 0.2), 4),
            "trainer.learning_rate": rate,
            "trainer.packing": draw.random() < 0.5,
            "trainer.lr_scheduler_type": draw.choice(["cosine", "linear", "constant"]),
        }
        loss = 1 + 0.4 * (math.log10(rate) + 3.2) ** 2 - 0.05 * math.log2(rank) + draw.gauss(0, 0.03)
        curve = [loss + 3 * math.exp(-i / 12) + draw.gauss(0, 0.02) for i in range(steps)]
        path = sweep / f"lora-r{rank}-lr{rate:.2g}-{number:04d}"
        samples = [
            {
                "id": str(i),
                "prompt": f"Question {i}?",
                "reference": "yes",
                "answer_before": "mu",
                "answer": "yes" if i % 2 else f"no, says {number}",
            }
            for i in range(4)
        ]
        if number % 25 == 24:
            status = {"error": "RuntimeError: the loss is not a number", "step": 20}
            write_run(path, changes, state="failed", status=status, curve=curve[:2])
        elif number % 10 == 9:
            write_run(path, changes, state="interrupted", status={"pruned_at_step": 100}, curve=curve[:10])
        else:
            write_run(
                path, changes, {"eval_loss": loss + 0.1, "exact_match": 1 / (1 + loss)}, curve=curve, samples=samples
            )
    return write_ledger(sweep, sampler="tpe", left_out=[{"overrides": ["peft.r=0"], "reason": "peft.r=0 : too small"}])
