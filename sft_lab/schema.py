"""Every config key: its type, default, and what is allowed.

The files in conf/ hold what a run uses; the defaults here only make each group constructible in a test. `metadata`
carries what a type cannot say: `choices` (allowed values), `min` and `max`. `extra` mappings pass
further arguments to the library class that the group builds; `checks.py` checks their keys against that class.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def _choice(default: str, *allowed: str) -> Any:
    return field(default=default, metadata={"choices": allowed})


def _at_least(minimum: float, default: Any) -> Any:
    return field(default=default, metadata={"min": minimum})


@dataclass
class SuggestedConfig:
    """What suits a model of this size; `trainer` takes these unless it is told otherwise."""

    learning_rate: float = 2e-4
    gradient_checkpointing: bool = True


@dataclass
class ModelConfig:
    path: str = MISSING  # a directory, a hub id, or embedded:NAME
    revision: str = "main"
    dtype: str = _choice("auto", "auto", "float32", "bfloat16", "float16")
    attn_implementation: str = _choice(
        "auto", "auto", "sdpa", "sdpa_per_document", "eager", "flash_attention_2", "flash_attention_3"
    )
    trust_remote_code: bool = False
    suggested: SuggestedConfig = field(default_factory=SuggestedConfig)
    extra: dict[str, Any] = field(default_factory=dict)  # AutoModelForCausalLM.from_pretrained


@dataclass
class PeftConfig:
    method: str = _choice("lora", "none", "lora")
    r: int = _at_least(0, 16)
    lora_alpha: int = _at_least(0, 32)
    lora_dropout: float = _at_least(0, 0.05)
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    modules_to_save: list[str] = field(default_factory=list)
    bias: str = _choice("none", "none", "all", "lora_only")
    use_rslora: bool = False
    use_dora: bool = False
    extra: dict[str, Any] = field(default_factory=dict)  # peft.LoraConfig


@dataclass
class QuantConfig:
    method: str = _choice("none", "none", "bnb_4bit", "bnb_8bit")
    bnb_4bit_quant_type: str = _choice("nf4", "nf4", "fp4")
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: str = _choice("auto", "auto", "float32", "bfloat16", "float16")
    llm_int8_threshold: float = _at_least(0, 6.0)
    extra: dict[str, Any] = field(default_factory=dict)  # transformers.BitsAndBytesConfig


def _between(low: float, high: float, default: float) -> Any:
    return field(default=default, metadata={"min": low, "max": high})


FORMATS = (
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text", "tokens",
)  # fmt: skip


@dataclass
class LocationConfig:
    """Where rows are and what they look like."""

    source: str = _choice("file", "file", "hub")
    path: str = MISSING  # a file, a directory of files, a glob, or a hub id
    name: str = ""  # the hub data set's configuration
    split: str = "train"
    revision: str = "main"
    format: str = _choice("auto", *FORMATS)
    columns: dict[str, str] = field(default_factory=dict)  # {our column: the data's}; a.0.b leads into nested ones
    ignore_columns: list[str] = field(default_factory=list)  # columns, and keys of messages, that count as absent


@dataclass
class SourceConfig(LocationConfig):
    """One of several sources that are mixed."""

    weight: float = _at_least(0, 1.0)  # share of the rows drawn, against the other sources' weights
    sample: float = _between(0, 1, 1.0)  # share of its rows that take part
    max_rows: int = _at_least(-1, -1)
    seed: int = _at_least(-1, -1)  # of its sample; -1: data.seed


@dataclass
class DataConfig(LocationConfig):
    source: str = _choice("file", "requests", "file", "hub", "mixture")
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # of a mixture, by names of your own
    mix: str = _choice("concatenate", "concatenate", "interleave_first_exhausted", "interleave_all_exhausted")
    seed: int = _at_least(0, 42)  # of samples, mixing and of which rows are held out
    eval_path: str = ""
    eval_split: str = ""
    eval_rows: int = _at_least(-1, -1)  # held out of the training rows where there is no eval_path or eval_split
    eval_fraction: float = _between(0, 1, 0.0)  # the same as a share of them
    train_rows: int = _at_least(-1, -1)  # -1: all
    loss: str = _choice("assistant", "assistant", "completion", "all", "last_turn")
    on_bad_row: str = _choice("error", "error", "skip")
    on_long_row: str = _choice("drop", "drop", "truncate", "split", "error")
    truncation_side: str = _choice("right", "right", "left")
    on_context_mismatch: str = _choice(
        "warn", "warn", "split", "error"
    )  # where a row is not what the model is asked with
    deduplicate: str = _choice("none", "none", "exact", "near")
    on_leak: str = _choice("error", "error", "drop")
    streaming: bool = False
    shuffle_buffer: int = _at_least(1, 1000)  # rows that streaming draws from
    num_proc: int = _at_least(0, 0)  # processes that tokenise; 0: one, or all cores where there is much to do
    metrics: list[str] = field(default_factory=list)


@dataclass
class ChatTemplateConfig:
    name: str = _choice("auto", "auto", "chatml", "zephyr", "llama3", "mistral", "gemma", "qwen", "alpaca", "file")
    path: str = ""  # of a jinja file, for name=file
    kwargs: dict[str, Any] = field(default_factory=dict)  # variables of the template, such as enable_thinking
    date: str = ""  # that the template writes, as YYYY-MM-DD; empty: the day on which the run begins


@dataclass
class TrainerConfig:
    learning_rate: float = _at_least(0, 2e-4)
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = _at_least(0, 0.03)  # below 1: share of all steps
    weight_decay: float = _at_least(0, 0.0)
    max_grad_norm: float = _at_least(0, 1.0)
    optim: str = "adamw_torch"
    num_train_epochs: float = 1.0
    max_steps: int = _at_least(-1, -1)
    per_device_train_batch_size: int = _at_least(1, 8)
    per_device_eval_batch_size: int = _at_least(1, 16)
    gradient_accumulation_steps: int = _at_least(1, 1)
    global_batch_size: int = _at_least(0, 0)  # 0: per_device_train_batch_size x gradient_accumulation_steps x processes
    max_length: int = _at_least(2, 1024)
    packing: bool = False
    train_sampling_strategy: str = _choice("auto", "auto", "random", "group_by_length", "sequential")
    gradient_checkpointing: bool = False
    use_reentrant: bool = False
    precision: str = _choice("auto", "auto", "fp32", "bf16", "fp16")
    logging_steps: int = _at_least(1, 5)
    eval_steps: int = _at_least(0, 0)  # 0: only before the first and after the last step
    save_steps: int = _at_least(1, 50)
    save_minutes: float = _at_least(0, 0.0)  # a checkpoint also when the last one is so old; 0: by steps alone
    save_total_limit: int = _at_least(2, 2)
    dataloader_num_workers: int = _at_least(0, 0)
    extra: dict[str, Any] = field(default_factory=dict)  # trl.SFTConfig


@dataclass
class DistributedConfig:
    method: str = _choice(
        "single", "single", "ddp", "fsdp2", "fsdp1", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"
    )
    num_processes: int = _at_least(0, 1)  # over all nodes; 0: as many as were started, else one a GPU
    max_restarts: int = _at_least(0, 0)  # how often all ranks start again from the last checkpoint when one dies
    timeout_min: int = _at_least(1, 30)  # how long a rank waits for the others
    reshard_after_forward: bool = True  # FSDP; false: gathered weights stay until the backward pass has used them
    shard_size: int = _at_least(0, 0)  # FSDP2; ranks that share one copy of the weights, 0: all of them
    cpu_offload: bool = False  # FSDP; weights, gradients and optimizer state wait in the memory of the CPU
    state_dict_type: str = _choice("FULL_STATE_DICT", "FULL_STATE_DICT", "SHARDED_STATE_DICT")  # of FSDP's checkpoints
    context_parallel_size: int = _at_least(1, 1)  # FSDP2; ranks that share the tokens of a row
    offload_optimizer: bool = False  # DeepSpeed
    offload_param: bool = False  # DeepSpeed ZeRO-3
    deepspeed: dict[str, Any] = field(default_factory=dict)  # what else goes into DeepSpeed's own config

    @property
    def shards_weights(self) -> bool:
        """Whether no rank holds the whole model."""
        return self.method in ("fsdp1", "fsdp2", "deepspeed_zero3")

    @property
    def replicas(self) -> int:
        """Ranks that see rows of their own; those of one context-parallel group share theirs."""
        return self.num_processes // self.context_parallel_size


@dataclass
class TrackingConfig:
    method: str = _choice("wandb", "none", "wandb", "tensorboard", "trackio", "mlflow")
    project: str = "sft_lab"
    entity: str = ""
    group: str = ""  # a sweep's trials share its name when this is empty
    job_type: str = "train"
    name: str = ""
    tags: list[str] = field(default_factory=list)
    notes: str = ""
    mode: str = _choice("auto", "auto", "online", "offline")
    log_adapter: bool = True
    log_data: bool = True  # the data set as a reference artifact that the run uses
    init_timeout_s: int = _at_least(1, 10)
    finish_timeout_s: int = _at_least(1, 30)


@dataclass
class EvaluationConfig:
    rows: int = _at_least(0, 128)  # held-out rows answered by greedy generation; 0: none
    before: bool = True
    max_new_tokens: int = _at_least(1, 96)
    batch_size: int = _at_least(1, 32)
    samples: int = _at_least(0, 8)


@dataclass
class PreflightConfig:
    allow: list[str] = field(default_factory=list)  # names of findings that do not stop the run


@dataclass
class SweepConfig:
    name: str = MISSING
    objective: str = "eval_loss"  # any metric of an evaluation: eval_loss or one of data.metrics
    direction: str = _choice("auto", "auto", "minimize", "maximize")
    on_bad_trial: str = _choice("error", "error", "skip")
    isolate: bool = False
    dry_run: bool = False
    link_best_to: str = ""  # a collection of a W&B registry, such as wandb-registry-model/NAME


@dataclass
class Config:
    seed: int = _at_least(0, 42)
    model: ModelConfig = field(default_factory=ModelConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: DataConfig = field(default_factory=DataConfig)
    chat_template: ChatTemplateConfig = field(default_factory=ChatTemplateConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
