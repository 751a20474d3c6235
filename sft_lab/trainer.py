"""TRL's SFTTrainer, built from the config: its arguments, the batches it is given, and what watches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_lab import adapter, attention, distributed, integrations, loss
from sft_lab import model as models
from sft_lab.data import streaming
from sft_lab.data.batches import TrainingRows
from sft_lab.data.prepared import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.errors import ConfigError
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config


@dataclass
class Collator:
    """Rows of tokens to one batch.

    Rows of one document, and packed ones for an attention that takes its documents from a mask, are padded on the
    right: input_ids, labels and position_ids, each (rows, longest row). There is no attention mask: causal attention
    cannot see padding that stands on the right, and without a mask Transformers takes the packed documents of a row
    from position_ids, which begin again at 0 with each, and keeps them apart.

    With `flatten`, packed rows become one row without padding, (1, tokens), beside which stand the documents' bounds as
    flash attention's kernels know them, and each token's document, as layers that attend to nothing know it.
    """

    pad_token_id: int
    flatten: bool = False
    multiple: int = 1  # of tokens that a padded row has

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if self.flatten and all("seq_lengths" in row for row in rows):
            return self._flattened(rows)
        return self._padded(rows)

    def _padded(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        longest = -(-longest // self.multiple) * self.multiple
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            padding = longest - len(row["input_ids"])
            batch["input_ids"].append(row["input_ids"] + [self.pad_token_id] * padding)
            batch["labels"].append(row["labels"] + [IGNORE] * padding)
            batch["position_ids"].append(_positions(row.get("seq_lengths"), longest, padding))
        return {name: torch.tensor(values) for name, values in batch.items()}

    def _flattened(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        lengths = [length for row in rows for length in row["seq_lengths"]]
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return {
            **{name: torch.tensor([[x for row in rows for x in row[name]]]) for name in ("input_ids", "labels")},
            "position_ids": torch.tensor([[position for length in lengths for position in range(length)]]),
            "seq_idx": torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), bounds.diff())[None],
            **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds),
            **{name: max(lengths) for name in ("max_length_q", "max_length_k")},
        }


def _positions(seq_lengths: list[int] | None, longest: int, padding: int) -> list[int]:
    if seq_lengths is None:  # one document; counting on through the padding lets attention stay plainly causal
        return list(range(longest))
    return [position for length in [*seq_lengths, padding] for position in range(length)]


def flattens(config: Config) -> bool:
    """Whether the run's micro-batches are one row of documents that attention takes one by one."""
    by_mask = ("sdpa", "eager")
    return config.trainer.packing and models.resolve_attention(config) not in by_mask


def attention_of(config: Config) -> str:
    """In words, what attention the run uses and how packed documents are kept apart."""
    used = models.resolve_attention(config)
    if not config.trainer.packing:
        return used
    return f"{used}, " + ("documents attended to one by one" if flattens(config) else "documents kept apart by a mask")


def padding_share(config: Config, rows: TrainingRows) -> float:
    """Share of what the model computes in the first epoch that is padding."""
    if flattens(config):
        return 0.0
    padded = sum(int(rows.lengths[batch].max()) * len(batch) for batch in rows.micro_batches())
    return 1 - int(rows.lengths.sum()) / padded


def build_arguments(config: Config, run: RunDirectory) -> Any:
    """The `SFTConfig` of a run."""
    from trl import SFTConfig

    t, precision = config.trainer, models.resolve_precision(config).training
    reentrant = t.use_reentrant or config.distributed.method == "deepspeed_zero3"  # its gathering needs it
    return SFTConfig(
        output_dir=str(run.checkpoints),
        seed=config.seed,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler_type,
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim=t.optim,
        num_train_epochs=t.num_train_epochs,
        max_steps=t.max_steps,
        per_device_train_batch_size=t.per_device_train_batch_size,
        per_device_eval_batch_size=t.per_device_eval_batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        max_length=t.max_length,
        packing=False,  # rows come packed and in order, see data/batches.py
        train_sampling_strategy="sequential",
        gradient_checkpointing=t.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant} if t.gradient_checkpointing else None,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=models.device() == "cpu",
        logging_steps=t.logging_steps,
        logging_nan_inf_filter=False,  # would report the last good loss in place of NaN
        eval_strategy="steps" if t.eval_steps else "no",
        eval_steps=t.eval_steps or None,
        save_strategy="steps",
        save_steps=t.save_steps,
        save_total_limit=t.save_total_limit,
        dataloader_num_workers=t.dataloader_num_workers,
        dataloader_pin_memory=models.device() != "cpu",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to="none",  # callbacks.py writes to metrics.jsonl and to the tracker; others' callbacks come as they are
        project=config.tracking.project,
        run_name=integrations.run_name(config.tracking, run),
        disable_tqdm=True,
        **distributed.arguments(config),
        trust_remote_code=config.model.trust_remote_code,
        **t.extra,
    )


def build(config: Config, run: RunDirectory, data: Prepared, callbacks: list[Any]) -> Any:
    """The SFTTrainer with the base model loaded and the adapter on it.

    Raises:
        ConfigError: context parallelism, and a head that it would mislead.
    """
    from transformers import PrinterCallback, set_seed

    from sft_lab.evaluating import EvaluatingTrainer

    data.tokenizer.padding_side = "right"
    arguments = build_arguments(config, run)  # before the model: ZeRO-3 shards it as it is read
    distributed.use_one_gpu(config, arguments)
    set_seed(config.seed)  # for weights that the model's files lack
    model = models.load_model(config)
    models.name_experts(model)
    set_seed(config.seed)  # for new tokens' embeddings and the adapter, whether or not loading drew anything
    new_tokens = adapter.new_tokens(model, data.template, data.tokenizer, models.fit_embeddings(model, data.tokenizer))
    collator = Collator(data.tokenizer.pad_token_id, flattens(config), distributed.row_multiple(config))
    stream = streaming.training_rows(config, data) if config.data.streaming else None
    trainer = EvaluatingTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train if stream is None else stream,
        eval_dataset=data.eval if len(data.eval) else None,
        processing_class=data.tokenizer,
        data_collator=collator,
        peft_config=adapter.build(config.peft, new_tokens),
        callbacks=callbacks,
    )
    adapter.save_what_is_trained(trainer.model)
    if stream is None:  # SFTTrainer takes nothing but a datasets.Dataset, its loop takes any
        trainer.train_dataset = TrainingRows(data.train, data.column("length"), config, collator.pad_token_id)
    distributed.keep_precision(trainer)
    trainer.remove_callback(PrinterCallback)  # prints every log as a dict
    base = causal_lm(trainer.model)
    if config.distributed.context_parallel_size > 1 and _writes_new_tokens(trainer.model):
        raise ConfigError(
            f"distributed.context_parallel_size={config.distributed.context_parallel_size} : the rows of new tokens in "
            "the output embedding need a head that knows whole rows (allowed: 1, or a chat_template without new tokens)"
        )
    if models.device() == "cpu" or _writes_new_tokens(trainer.model) or distributed.hides_head(config, base):
        loss.score_supervised_only(base)
    return trainer


def prove_isolation(config: Config, trainer: Any) -> None:
    """That packed documents do not see each other, computed as training computes.

    Raises:
        ConfigError: they do.
    """
    if config.trainer.packing:
        with trainer.accelerator.autocast():
            attention.prove_isolation(trainer.model, trainer.data_collator)


def _writes_new_tokens(model: Any) -> bool:
    """Whether rows of a separate output embedding are trained: TRL's head, which reads the weight, would not see it."""
    return adapter.trains_tokens(model) and not causal_lm(model).config.get_text_config().tie_word_embeddings


def causal_lm(model: Any) -> Any:
    """The causal LM below an adapter, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model
