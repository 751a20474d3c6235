"""What a run will do and cost, and every check that can stop it before it costs anything."""

from __future__ import annotations

import math
import shutil
from typing import Any

from sft_lab import checkpoints, distributed, findings, model_findings, tracking
from sft_lab import config as configs
from sft_lab import model as models
from sft_lab import trainer as trainers
from sft_lab.data.batches import TrainingRows
from sft_lab.data.prepared import Prepared
from sft_lab.errors import PreflightError
from sft_lab.findings import Report
from sft_lab.runs import RunDirectory, read_json
from sft_lab.schema import Config, TrainerConfig

# Of a checkpoint, for each trained parameter: itself in fp32 and its two AdamW moments; under FSDP once more, as the
# state that training goes on from; under DeepSpeed that, and the optimizer's own copy.
_CHECKPOINT_BYTES = {"single": 12, "ddp": 12, "fsdp1": 16, "fsdp2": 16}
_DEEPSPEED_BYTES = 20


def check(config: Config, data: Prepared, run: RunDirectory) -> Report:
    """Examine a prepared run and stop it where it would be wasted.

    Raises:
        PreflightError: each finding that is an error, by name, with rows that show it.
    """
    report = examine(config, data, run)
    if report.errors:
        raise PreflightError(report.errors)
    return report


def examine(config: Config, data: Prepared, run: RunDirectory, elsewhere: bool = False) -> Report:
    """Everything that can be said of a prepared run before it costs anything.

    Args:
        elsewhere: another machine is to train it, which examines it again; of this one nothing is asked.

    Raises:
        ConfigError: a package that it needs is not installed, or the machine cannot do what is asked for.
        PreflightError: the adapter does not fit the architecture.
    """
    distributed.require(config)
    tracking.require(config.tracking)
    report = Report(config.preflight.allow)
    if not elsewhere:
        _machine(config, report)
    findings.of_data(config, data, report)
    model_findings.of_model(config, data, report)
    _steps(config, data, report)
    _disk(config, data, run, report)
    report.numbers["memory"] = report.numbers["time_s"] = None  # not predicted yet
    # A sweep's name says where a run lands and, unless it was given, what time it is.
    report.numbers["config"] = {name: part for name, part in configs.to_dict(config).items() if name != "sweep"}
    _unknown_names(config, report)
    return report


def _machine(config: Config, report: Report) -> None:
    models.require_machine(config)
    distributed.require_machine(config)
    if doubts := distributed.doubts(config):
        report.add("distributed", "error", doubts)


def _unknown_names(config: Config, report: Report) -> None:
    """A name in preflight.allow that no finding has, mistyped or no longer needed."""
    names = {finding["name"] for finding in report.findings}
    for name in config.preflight.allow:
        if name not in names:
            report.add("preflight.allow", "warning", f"{name} is no finding of this run")


def _steps(config: Config, data: Prepared, report: Report) -> None:
    t = config.trainer
    rows = TrainingRows(data.train, data.column("length"), config)
    at_once = t.per_device_train_batch_size * t.gradient_accumulation_steps * config.distributed.replicas
    per_epoch = math.ceil(len(rows) / at_once)
    steps = t.max_steps if t.max_steps > 0 else math.ceil(t.num_train_epochs * per_epoch)
    padding = round(trainers.padding_share(config, rows), 4)
    total = report.numbers["tokens"]["total"]
    report.numbers["tokens"]["padding_share"] = padding
    report.numbers |= {"steps": steps, "tokens_per_step": round(total / per_epoch)}
    report.add("steps", "fact", f"{steps} steps of about {report.numbers['tokens_per_step']} tokens")
    if rows.packs is not None:
        filled = round(total / (len(rows.packs) * t.max_length), 4)
        report.numbers["packing"] = {"rows": len(rows.packs), "filled": filled}
        packed = f"{len(data.train)} rows in {len(rows.packs)} of {t.max_length} tokens, {filled:.1%} full"
        report.add("packing", "fact", packed)
    report.add("padding", "fact", f"{padding:.1%} of what the model computes is padding")


def _disk(config: Config, data: Prepared, run: RunDirectory, report: Report) -> None:
    """Checkpoints and adapter, each with a tokenizer beside it, against the space that is there."""
    trainable, tokenizer = report.numbers["parameters"]["trainable"], _tokenizer_bytes(data)
    each = _CHECKPOINT_BYTES.get(config.distributed.method, _DEEPSPEED_BYTES) * trainable + tokenizer
    report.numbers |= {"checkpoint_bytes": each, "adapter_bytes": 4 * trainable + tokenizer}
    kept, disk = _kept(config.trainer, report.numbers)
    report.numbers["disk_bytes"] = disk
    report.add("disk", "fact", f"{disk / 1e6:.0f} MB for {kept} checkpoints and the adapter")
    _require_disk(disk, run, report)


def _kept(t: TrainerConfig, numbers: dict[str, Any]) -> tuple[int, int]:
    """The most checkpoints that lie there at a time, and what they and the adapter take, in bytes."""
    most = numbers["steps"] if t.save_minutes else math.ceil(numbers["steps"] / t.save_steps)
    kept = min(t.save_total_limit + 1, most)  # the oldest goes after the newest is written
    return kept, kept * numbers["checkpoint_bytes"] + numbers["adapter_bytes"]


def _require_disk(needed: int, run: RunDirectory, report: Report) -> None:
    """An error where so many bytes have no room; what the run has saved already is among them."""
    place = next(p for p in (run.path, *run.path.parents) if p.exists())
    free, saved = shutil.disk_usage(place).free, checkpoints.saved_bytes(run)
    if needed > free + saved:
        told = f"checkpoints and adapter need {needed - saved} bytes, {place} has {free}"
        report.add("disk_full", "error", told)


def check_again(config: Config, run: RunDirectory) -> None:
    """What a run that goes on needs of this machine, which may be another one, or fuller.

    Raises:
        ConfigError: a package is not installed, or the machine cannot do what is asked for.
        PreflightError: what is still to be saved has no room.
    """
    report = Report(config.preflight.allow)
    distributed.require(config)
    _machine(config, report)
    if run.preflight.is_file():  # else it ended before it was checked, and is now
        _, disk = _kept(config.trainer, read_json(run.preflight))
        _require_disk(disk, run, report)
    if report.errors:
        raise PreflightError(report.errors)


def _tokenizer_bytes(data: Prepared) -> int:
    """Of tokenizer.json, which is 33 MB for a vocabulary of 262,144 (Gemma 3); slow tokenizers have less to save."""
    return len(data.tokenizer.backend_tokenizer.to_str(pretty=True).encode()) if data.tokenizer.is_fast else 0
