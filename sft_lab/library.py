"""Which arguments the libraries' own classes take, read from their source files.

Importing transformers and torch only to check a key would cost a mistyped command line several seconds.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A library class that `extra` passes arguments to."""

    name: str
    source: tuple[tuple[str, str, str], ...]  # (package, file within it, class or class.method)
    ours: dict[str, str] = field(default_factory=dict)  # arguments that sft_lab sets, and the key that does it


EXTRA_OF = {
    "model": Owner(
        "AutoModelForCausalLM.from_pretrained",
        (("transformers", "modeling_utils.py", "PreTrainedModel.from_pretrained"),),
        {
            "pretrained_model_name_or_path": "model.path",
            "quantization_config": "quant",
            "config": "model.path",
            "device_map": "distributed",
        },
    ),
    "peft": Owner(
        "peft.LoraConfig",
        (
            ("peft", "tuners/lora/config.py", "LoraConfig"),
            ("peft", "config.py", "PeftConfig"),
            ("peft", "config.py", "PeftConfigMixin"),
        ),
        {
            "peft_type": "peft.method",
            "task_type": "peft.method",
            "inference_mode": "peft.method",
            "base_model_name_or_path": "model.path",
            "revision": "model.revision",
            "peft_version": "peft.method",
            "auto_mapping": "peft.method",
        },
    ),
    "quant": Owner(
        "transformers.BitsAndBytesConfig",
        (("transformers", "utils/quantization_config.py", "BitsAndBytesConfig.__init__"),),
        {"load_in_4bit": "quant=nf4", "load_in_8bit": "quant=int8"},
    ),
    "trainer": Owner(
        "trl.SFTConfig",
        (
            ("trl", "trainer/sft_config.py", "SFTConfig"),
            ("trl", "trainer/base_config.py", "_BaseConfig"),
            ("transformers", "training_args.py", "TrainingArguments"),
        ),
        {
            "output_dir": "hydra.run.dir",
            "seed": "seed",
            "data_seed": "seed",
            "bf16": "trainer.precision",
            "fp16": "trainer.precision",
            "use_cpu": "trainer.precision",
            "report_to": "tracking",
            "run_name": "tracking.name",
            "project": "tracking.project",
            "gradient_checkpointing_kwargs": "trainer.use_reentrant",
            "eval_strategy": "trainer.eval_steps",
            "bf16_full_eval": "trainer.precision",
            "fp16_full_eval": "trainer.precision",
            "save_strategy": "trainer.save_steps",
            "logging_strategy": "trainer.logging_steps",
            "remove_unused_columns": "data",
            "dataset_kwargs": "data",
            "model_init_kwargs": "model",
            "assistant_only_loss": "data",
            "completion_only_loss": "data",
            "packing_strategy": "trainer.packing",
            "padding_free": "trainer.packing",
            "eval_packing": "trainer.packing",
            "dataset_text_field": "data",
            "dataset_num_proc": "data",
            "shuffle_dataset": "seed",
            "truncation_mode": "data.on_long_row",
            "pad_to_multiple_of": "trainer.max_length",
            "pad_token": "chat_template",
            "eos_token": "chat_template",
            "dataloader_pin_memory": "the device",
            "dataloader_persistent_workers": "trainer.dataloader_num_workers",  # would keep one order
            "dataloader_drop_last": "data",
            "logging_nan_inf_filter": "trainer.logging_steps",
            "trust_remote_code": "model.trust_remote_code",
            "disable_tqdm": "tracking",
            "resume_from_checkpoint": "the verb resume",
            "chat_template_path": "chat_template",
            "do_train": "the verb train",
            "do_eval": "trainer.eval_steps",
            "push_to_hub": "the adapter in the run directory",
            "fsdp": "distributed=fsdp2",
            "fsdp_config": "distributed",  # its activation_checkpointing, for one, saves an adapter without tensors
            "deepspeed": "distributed=deepspeed_zero2",
            "parallelism_config": "distributed.context_parallel_size",
            "ddp_timeout": "distributed.timeout_min",
            "ddp_find_unused_parameters": "distributed",
            "ddp_backend": "the device",
            "accelerator_config": "distributed",
            "save_only_model": "the verb resume",
            "save_on_each_node": "hydra.run.dir",
        },
    ),
}

# from_pretrained takes these through **kwargs; its own documentation lists them.
_FROM_PRETRAINED = {
    "attn_implementation", "dtype", "subfolder", "offload_folder", "offload_buffers", "max_memory", "variant",
    "low_cpu_mem_usage", "use_kernels", "experts_implementation", "rope_scaling", "output_loading_info", "tp_plan",
    "tp_size", "device_mesh", "key_mapping", "gguf_file", "proxies", "code_revision",
}  # fmt: skip


OPTIMIZERS = ("transformers", "training_args.py", "OptimizerNames")
SCHEDULERS = ("transformers", "trainer_utils.py", "SchedulerType")


def _class_body(package: str, file: str, name: str) -> list[ast.stmt]:
    spec = find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))
    return next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name).body


@functools.cache
def enum_values(package: str, file: str, name: str) -> frozenset[str]:
    """The values of an enumeration of texts."""
    body = _class_body(package, file, name)
    return frozenset(
        str(n.value.value) for n in body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)
    )


@functools.cache
def field_names(source: tuple[tuple[str, str, str], ...]) -> frozenset[str]:
    """Names of the dataclass fields of a class, or of the parameters of a method, over all of `source`."""
    names: set[str] = set()
    for package, file, where in source:
        class_name, _, method = where.partition(".")
        names |= _names_in(_class_body(package, file, class_name), method)
        if method == "from_pretrained":
            names |= _FROM_PRETRAINED
    return frozenset(names)


def _names_in(body: list[ast.stmt], method: str) -> set[str]:
    if not method:
        return {n.target.id for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    arguments = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == method).args
    return {a.arg for a in (*arguments.args, *arguments.kwonlyargs)} - {"self", "cls"}
