"""What a run will do and cost, and every check that can stop it before it costs anything."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from typing import Any

from sft_lab import adapter, evaluate, tracking
from sft_lab import config as configs
from sft_lab import model as models
from sft_lab.data.prepare import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.errors import PreflightError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config

_ADAM_BYTES = 12  # a trained parameter in fp32 and its two AdamW moments


@dataclass
class Report:
    """Findings, and what preflight.json holds beside them."""

    findings: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, level: str, message: str, rows: list[str] | None = None) -> None:
        """`level` is error, warning or fact; `rows` are ids of rows that show it."""
        self.findings.append({"name": name, "level": level, "message": message, "rows": rows or []})

    @property
    def errors(self) -> list[str]:
        return [f"{f['name']} : {f['message']}" for f in self.findings if f["level"] == "error"]

    def as_dict(self) -> dict[str, Any]:
        return {"ok": not self.errors, "findings": self.findings, **self.numbers}


def check(config: Config, data: Prepared, run: RunDirectory) -> Report:
    """Examine a prepared run.

    Raises:
        PreflightError: something that would waste the run, each finding by name.
    """
    models.resolve_precision(config)
    if config.tracking.method == "wandb" and config.tracking.mode == "online":
        tracking.require_key()
    report = Report()
    _rows(config, data, report)
    _model(config, data, report)
    _steps_and_disk(config, data, run, report)
    report.numbers["memory"] = report.numbers["time_s"] = None  # not predicted yet
    report.numbers["config"] = configs.to_dict(config)
    if report.errors:
        raise PreflightError(report.errors)
    return report


def _rows(config: Config, data: Prepared, report: Report) -> None:
    facts = data.facts
    total, supervised = facts["tokens"]["total"], facts["tokens"]["supervised"]
    report.numbers |= {
        "rows": facts["rows"],
        "eval_rows": len(data.eval),
        "tokens": {"total": total, "supervised": supervised, "padding_share": _padding_share(config, data)},
        "data_fingerprint": facts["data_fingerprint"],
    }
    report.add("tokens", "fact", f"{total} tokens, {supervised / total:.0%} of them carry loss")
    report.add("chat_template", "fact", f"{facts['chat_template']}; a turn ends with {facts['turn_end']}")
    unsupervised = [
        str(number)
        for number, labels in enumerate(data.train["labels"], start=1)
        if all(label == IGNORE for label in labels)
    ]
    if unsupervised:
        report.add("no_supervised_token", "error", f"{len(unsupervised)} rows carry no loss", unsupervised[:20])
    for reason, rows in facts["dropped_rows"].items():
        report.add(f"dropped_{reason}", "warning", f"{len(rows)} rows left out ({reason})", rows)
    for reason, rows in facts["dropped_eval_rows"].items():
        report.add(f"dropped_eval_{reason}", "warning", f"{len(rows)} held-out rows left out ({reason})", rows)
    if facts["truncated_rows"]:
        rows = facts["truncated_rows"]
        report.add(
            "truncated", "warning", f"{len(rows)} rows cut to trainer.max_length={config.trainer.max_length}", rows
        )
    unknown = [name for name in config.data.metrics if name not in evaluate.METRICS]
    if unknown:
        report.add("data.metrics", "error", f"no such metric: {unknown} (allowed: {', '.join(evaluate.METRICS)})")
    if config.trainer.eval_steps and not len(data.eval):
        report.add("trainer.eval_steps", "error", f"{config.trainer.eval_steps} given, and there are no held-out rows")


def _padding_share(config: Config, data: Prepared) -> float:
    """Share of padding when rows are batched in the order they have; shuffling changes it little."""
    lengths = [len(ids) for ids in data.train["input_ids"]]
    size = config.trainer.per_device_train_batch_size
    padded = sum(max(batch) * len(batch) for batch in (lengths[i : i + size] for i in range(0, len(lengths), size)))
    return round(1 - sum(lengths) / padded, 4)


def _model(config: Config, data: Prepared, report: Report) -> None:
    total, trainable, vocabulary = _count_parameters(config)
    report.numbers["parameters"] = {"total": total, "trainable": trainable}
    report.add("parameters", "fact", f"{trainable} of {total} parameters are trained ({trainable / total:.2%})")
    highest = max(max(ids) for ids in data.train["input_ids"])
    if highest >= vocabulary:
        report.add(
            "vocabulary", "error", f"token {highest} of the tokenizer has no embedding, the model has {vocabulary}"
        )


def _count_parameters(config: Config) -> tuple[int, int, int]:
    """All parameters, those trained, and rows of the embedding; from a model without weights.

    Raises:
        PreflightError: the adapter does not fit the architecture.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    architecture = models.load_config(config.model)
    with models.told(config.model), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.model.trust_remote_code)
    lora = adapter.build(config.peft)
    if lora is not None:
        try:
            model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        except ValueError as error:
            raise PreflightError(f"peft : does not fit this model ({error})") from None
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return sum(n for n, _ in counts), sum(n for n, trained in counts if trained), vocabulary


def _steps_and_disk(config: Config, data: Prepared, run: RunDirectory, report: Report) -> None:
    t = config.trainer
    per_epoch = math.ceil(math.ceil(len(data.train) / t.per_device_train_batch_size) / t.gradient_accumulation_steps)
    steps = t.max_steps if t.max_steps > 0 else math.ceil(t.num_train_epochs * per_epoch)
    row_tokens = report.numbers["tokens"]["total"] / len(data.train)
    report.numbers |= {"steps": steps, "tokens_per_step": round(row_tokens * t.global_batch_size)}
    trainable = report.numbers["parameters"]["trainable"]
    kept = min(t.save_total_limit + 1, math.ceil(steps / t.save_steps))  # the oldest goes after the newest is written
    disk = trainable * (_ADAM_BYTES * kept + 4)
    report.numbers["disk_bytes"] = disk
    place = next(p for p in (run.path, *run.path.parents) if p.exists())
    free = shutil.disk_usage(place).free
    if disk > free:
        report.add("disk", "error", f"checkpoints and adapter need {disk} bytes, {place} has {free}")
