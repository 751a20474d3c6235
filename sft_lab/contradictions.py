"""What is right by itself in a config, and wrong together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from sft_lab.schema import Config, DataConfig

FILE_KINDS = "a .jsonl, .json, .csv, .txt (or any of them .gz), .parquet or .arrow file, a directory of them or a glob"
_QUANT_OPTION = {"bnb_4bit": "nf4", "bnb_8bit": "int8"}  # as a person types them
_NOT_RESUMED = {  # of trainer.extra, and why a run that was killed would not come to the same result
    "load_best_model_at_end": "a run that was killed after its last save could not load it",
    "ignore_data_skip": "a run that goes on would see rows again",
}
_LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora", "extra")


def contradictions(c: Config) -> Iterator[str]:
    if c.quant.method != "none" and c.peft.method == "none":
        yield (
            f"quant={_QUANT_OPTION[c.quant.method]} with peft=none : a quantised base cannot be trained itself, it "
            "needs an adapter (allowed: quant=none, or peft=lora_r8, lora_r16, lora_r64)"
        )
    if c.quant.method == "bnb_8bit" and c.distributed.shards_weights:
        yield (
            f"quant=int8 : 8-bit weights cannot be cut into shards, as distributed={c.distributed.method} does "
            "(allowed: quant=nf4, or distributed=ddp)"
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
    if c.distributed.num_processes:
        yield from _batch_contradictions(c)
    if c.trainer.max_steps == 0 or (c.trainer.max_steps < 0 and c.trainer.num_train_epochs <= 0):
        yield (
            f"trainer.max_steps={c.trainer.max_steps} : with num_train_epochs={c.trainer.num_train_epochs:g} there is "
            "nothing to train (allowed: one of them above 0)"
        )
    for key, why in _NOT_RESUMED.items():
        if c.trainer.extra.get(key):
            yield f"trainer.extra.{key}={c.trainer.extra[key]} : {why} (allowed: leave it out)"
    yield from _distributed_contradictions(c)


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
            yield f"{key}.path= : is empty (allowed: {FILE_KINDS}, or a hub id)"
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


_ONLY_OF = {  # keys of `distributed`, and the methods that they have an effect with
    "reshard_after_forward": ("fsdp2", "fsdp1"),
    "cpu_offload": ("fsdp2", "fsdp1"),
    "state_dict_type": ("fsdp2", "fsdp1"),
    "shard_size": ("fsdp2",),
    "context_parallel_size": ("fsdp2",),
    "offload_optimizer": ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"),
    "offload_param": ("deepspeed_zero3",),
    "deepspeed": ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"),
}


def _distributed_contradictions(c: Config) -> Iterator[str]:
    d = c.distributed
    if d.method == "single":
        if d.num_processes != 1:
            yield (
                f"distributed.num_processes={d.num_processes} : distributed=single is one "
                f"(allowed: 1, or distributed=ddp distributed.num_processes={d.num_processes})"
            )
        if d.max_restarts:
            yield f"distributed.max_restarts={d.max_restarts} : distributed=single restarts nothing (allowed: 0)"
    elif d.num_processes == 1 and d.method == "ddp":
        yield "distributed.num_processes=1 : distributed=ddp is of several (allowed: 2 and more, or distributed=single)"
    for field in dataclasses.fields(d):
        default = field.default if field.default is not dataclasses.MISSING else {}
        methods = _ONLY_OF.get(field.name, (d.method,))
        if d.method not in methods and getattr(d, field.name) != default:
            allowed = ", ".join(f"distributed={method}" for method in methods)
            yield (
                f"distributed.{field.name}={getattr(d, field.name)} : has no effect with distributed={d.method} "
                f"(allowed: {allowed})"
            )
    if d.method != "single" and c.data.streaming:
        yield (
            "data.streaming=true : its tokens are made as training goes, which ranks never do "
            "(allowed: distributed=single, or data.streaming=false)"
        )
    if d.context_parallel_size > 1 and c.trainer.packing:
        yield (
            f"distributed.context_parallel_size={d.context_parallel_size} : with trainer.packing=true documents of a "
            "row would see each other (allowed: trainer.packing=false)"
        )
    if d.num_processes:
        if d.num_processes % d.context_parallel_size:
            yield (
                f"distributed.context_parallel_size={d.context_parallel_size} : does not divide "
                f"distributed.num_processes={d.num_processes} (allowed: {_divisors(d.num_processes, 1)})"
            )
        elif d.shard_size == 1 or (d.shard_size and d.replicas % d.shard_size):
            yield (
                f"distributed.shard_size={d.shard_size} : not a part of the {d.replicas} ranks that have rows of their "
                f"own (allowed: {_divisors(d.replicas, 2)}, or 0 for all of them)"
            )


def _divisors(number: int, least: int) -> str:
    return ", ".join(str(n) for n in range(least, number + 1) if not number % n)


def _batch_contradictions(c: Config) -> Iterator[str]:
    t, processes = c.trainer, c.distributed.replicas
    if not t.global_batch_size:
        return
    micro = t.per_device_train_batch_size * processes
    steps, rest = divmod(t.global_batch_size, micro)
    if rest or not steps:
        smaller = t.global_batch_size // processes
        fits = processes > 1 and not t.global_batch_size % processes
        yield (
            f"trainer.global_batch_size={t.global_batch_size} : not a multiple of per_device_train_batch_size x "
            f"processes={t.per_device_train_batch_size} x {processes} (allowed: {micro}, {2 * micro}, {3 * micro}, ..."
            + (f", or trainer.per_device_train_batch_size={smaller})" if fits else ")")
        )
    elif t.gradient_accumulation_steps not in (1, steps):
        yield (
            f"trainer.gradient_accumulation_steps={t.gradient_accumulation_steps} : does not give "
            f"global_batch_size={t.global_batch_size} (allowed: {steps}, or leave one of the two out)"
        )
