"""`distributed`: what SFTConfig is told of ranks, FSDP and DeepSpeed, and the proof that training is really done so.

Several launches quietly do something else than they say: `accelerate launch --cpu` starts one process, `fsdp=True` on
a CPU trains as DDP does. So nothing is believed: `prove` looks at the wrapped model before the first step.
"""

from __future__ import annotations

import math
import os
from typing import Any

from sft_lab import outside, ranks
from sft_lab.errors import ConfigError, RunError
from sft_lab.schema import Config

_FSDP = ("fsdp1", "fsdp2")


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


# ------------------------------------------------------------------------------------------------- before the start


def require(config: Config) -> None:
    """
    Raises:
        ConfigError: a package that is asked for is not installed.
    """
    from accelerate.utils import is_deepspeed_available

    method = config.distributed.method
    if method.startswith("deepspeed") and not is_deepspeed_available():
        raise ConfigError(
            f"distributed={method} : needs the package deepspeed (pip install --no-build-isolation "
            "'sft-lab[deepspeed]'; allowed without it: distributed=ddp, fsdp2)"
        )


def require_machine(config: Config) -> None:
    """
    Raises:
        ConfigError: this machine cannot do what is asked for.
    """
    import torch

    d, gpu = config.distributed, torch.cuda.is_available()
    if d.method == "fsdp1" and not gpu:
        raise ConfigError("distributed=fsdp1 : does not run on a CPU (allowed: distributed=ddp, or fsdp2 on GPUs)")
    started, visible = outside.group(), torch.cuda.device_count()
    here = started.ranks_here(d.num_processes) if started else d.num_processes
    if gpu and here > visible:
        raise ConfigError(
            f"distributed.num_processes={d.num_processes} : needs {here} GPUs here, {visible} are visible "
            "(allowed: one process a GPU)"
        )
    if d.context_parallel_size > 1 and not gpu:
        raise ConfigError(
            f"distributed.context_parallel_size={d.context_parallel_size} : its attention runs on GPUs alone "
            "(allowed: 1)"
        )


def doubts(config: Config) -> str:
    """What speaks against it before anything was tried; empty where nothing does."""
    import torch

    if config.distributed.method == "fsdp2" and not torch.cuda.is_available():
        return (
            "on a CPU Accelerate trains as DDP does in place of FSDP2, which the start would find out (distributed=ddp)"
        )
    return ""


def use_one_gpu(config: Config, arguments: Any) -> None:
    """Keep a process that is alone to its first GPU: Transformers would copy the model to all that it sees (torch's
    DataParallel), which TRL refuses."""
    if config.distributed.method == "single" and arguments.n_gpu > 1:
        arguments._n_gpu = 1


def _devices(config: Config) -> str:
    import torch

    visible = torch.cuda.device_count()
    return f"; {visible} GPUs are visible, this run uses the first (distributed=ddp uses all)" if visible > 1 else ""


# ------------------------------------------------------------------------------------------------ SFTConfig's part


def arguments(config: Config) -> dict[str, Any]:
    """The part of SFTConfig that `distributed` decides."""
    d = config.distributed
    if d.method == "single":
        return {}
    common = {"ddp_timeout": 60 * d.timeout_min, "ddp_find_unused_parameters": False}
    if d.method in _FSDP:
        return common | _fsdp(config)
    if d.method.startswith("deepspeed"):
        return common | {"deepspeed": _deepspeed(config)}
    return common


def row_multiple(config: Config) -> int:
    """Context parallelism cuts a row into two pieces a rank, so that causal attention is the same work for each."""
    size = config.distributed.context_parallel_size
    return 2 * size if size > 1 else 1


def hides_head(config: Config, base: Any) -> bool:
    """Whether TRL's fused head, which reads the output embedding's weight and never calls the module, goes wrong.

    Sharded apart from the rest, as it is below an adapter, a weight that is only read has its gradient summed over no
    other rank, and one that waits in the CPU's memory is never brought to the GPU.
    """
    trains = any(p.requires_grad for p in base.get_output_embeddings().parameters())
    d = config.distributed
    return d.shards_weights and (d.cpu_offload or (trains and config.peft.method != "none"))


def keep_precision(trainer: Any) -> None:
    """Under FSDP2 in bf16, leave what modules return as it is (bf16 between layers, log-probabilities in fp32), and sum
    the ranks' gradients in fp32 as DDP does; Accelerate would round both."""
    import torch

    if not trainer.is_fsdp_enabled or not trainer.args.bf16:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = torch.distributed.fsdp.MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32
        )


def lay_out_buckets(config: Config, trainer: Any) -> None:
    """Have DDP arrange its buckets before the first step, as it does once in a session, after a first backward pass.

    An element's place in a bucket decides in which order the ranks' gradients are added up, so that with more than two
    ranks a run that goes on would round its first step in another way than one that was never interrupted. The pass is
    over two tokens of padding, and what it leaves is cleared.
    """
    if config.distributed.method != "ddp":
        return
    padding = [trainer.processing_class.pad_token_id] * 2
    batch = trainer.data_collator([{"input_ids": padding, "labels": padding, "seq_lengths": [2]}])
    trainer.model_wrapped.train()
    with trainer.accelerator.autocast():
        loss = trainer.model_wrapped(**trainer._prepare_inputs(batch)).loss
    loss.backward()
    trainer.model_wrapped.zero_grad()


def _fsdp(config: Config) -> dict[str, Any]:
    d = config.distributed
    settings: dict[str, Any] = {
        "version": int(d.method.removeprefix("fsdp")),
        "reshard_after_forward": d.reshard_after_forward,
        "cpu_offload": d.cpu_offload,
        "state_dict_type": d.state_dict_type,
    }
    if d.method == "fsdp1":
        settings["reshard_after_forward"] = "full_shard" if d.reshard_after_forward else "shard_grad_op"
    found: dict[str, Any] = {"fsdp": True, "fsdp_config": settings}
    shard_size = d.shard_size or d.replicas
    if shard_size != d.replicas or d.context_parallel_size > 1:
        from accelerate.parallelism_config import ParallelismConfig

        found["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=d.replicas // shard_size,
            dp_shard_size=shard_size,
            cp_size=d.context_parallel_size,
        )
    return found


def _deepspeed(config: Config) -> dict[str, Any]:
    from accelerate.utils import merge_dicts

    d, t = config.distributed, config.trainer
    zero: dict[str, Any] = {"stage": int(d.method[-1])}
    if d.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if d.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    if zero["stage"] == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    settings = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto" if t.max_grad_norm else 0.0,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    found: dict[str, Any] = merge_dicts(d.deepspeed, settings)
    return found


# ------------------------------------------------------------------------------------------------------- the proof


def prove(config: Config, trainer: Any) -> str:
    """What the wrapped model says of itself, in words; called by every rank.

    Raises:
        RunError: it is not trained as `distributed` says.
    """
    d = config.distributed
    if d.method == "single":
        return f"distributed: single process{_devices(config)}"
    told = _PROOFS[d.method.rstrip("123") if d.method.startswith("deepspeed") else d.method](config, trainer)
    counts = ranks.gathered(told)
    if ranks.size() != d.num_processes or len(set(counts)) != 1:
        raise RunError(f"distributed={d.method} : the ranks differ: {counts}")
    return f"distributed: {ranks.size()} ranks, {told}"


def _prove_ddp(config: Config, trainer: Any) -> str:
    from torch.nn.parallel import DistributedDataParallel

    if not isinstance(trainer.model_wrapped, DistributedDataParallel):
        raise _otherwise(config, f"the model is a {type(trainer.model_wrapped).__name__}")
    return "gradients averaged by DistributedDataParallel"


def _prove_fsdp2(config: Config, trainer: Any) -> str:
    d = config.distributed
    parameters = list(trainer.model_wrapped.parameters())
    parts = [_parts(parameter) for parameter in parameters]
    sharded = [number for number in parts if number]
    if len(sharded) < len(parameters):
        raise _otherwise(config, f"{len(sharded)} of {len(parameters)} parameters are sharded")
    wanted = (d.shard_size or d.replicas) * d.context_parallel_size  # a row's ranks share weights too
    if set(sharded) != {wanted}:
        found = ", ".join(str(number) for number in sorted(set(sharded)))
        raise _otherwise(config, f"parameters are sharded over {found} of {d.num_processes} ranks, not over {wanted}")
    return f"{len(sharded)} of {len(parameters)} parameters sharded over {wanted} of {d.num_processes} ranks (DTensor)"


def _parts(parameter: Any) -> int:
    """Ranks that share one copy of it, 0 where each holds it whole."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return 0
    dimensions = zip(parameter.device_mesh.shape, parameter.placements, strict=True)
    cut = [size for size, placement in dimensions if placement.is_shard()]
    return math.prod(cut) if cut else 0


def _prove_fsdp1(config: Config, trainer: Any) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = FullyShardedDataParallel.fsdp_modules(trainer.model_wrapped)
    if len(units) < 2:
        raise _otherwise(config, f"{len(units)} modules are sharded")
    return f"{len(units)} modules sharded by FullyShardedDataParallel"


def _prove_deepspeed(config: Config, trainer: Any) -> str:
    stage = int(config.distributed.method[-1])
    engine = trainer.model_wrapped
    found = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0
    if found != stage:
        raise _otherwise(config, f"the model is a {type(engine).__name__} of ZeRO stage {found}")
    if stage < 3:
        return f"DeepSpeed ZeRO stage {stage}"
    parameters = list(engine.module.parameters())
    parted = [p for p in parameters if p.ds_tensor.numel() < p.ds_numel or ranks.size() == 1]  # alone it has all parts
    if not parted:
        raise _otherwise(config, "no parameter is partitioned")
    return f"DeepSpeed ZeRO stage 3, {len(parted)} of {len(parameters)} parameters partitioned"


def _otherwise(config: Config, found: str) -> RunError:
    return RunError(f"distributed={config.distributed.method} : is not what runs: {found}")


_PROOFS = {
    "ddp": _prove_ddp,
    "fsdp1": _prove_fsdp1,
    "fsdp2": _prove_fsdp2,
    "deepspeed_zero": _prove_deepspeed,
}
