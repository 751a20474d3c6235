"""TRL's SFTTrainer, built from the config: its arguments, the batches it is given, and what watches it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sft_lab import adapter, loss
from sft_lab import model as models
from sft_lab.data.prepare import Prepared
from sft_lab.data.tokenize import IGNORE
from sft_lab.runs import RunDirectory
from sft_lab.schema import Config


@dataclass
class Collator:
    """Rows of tokens to one batch, padded on the right.

    Gives input_ids, labels and position_ids, each (rows, longest row), and no attention mask: causal attention cannot
    see padding that stands on the right, and without a mask Transformers takes the packed documents of a row from
    position_ids, which begin again at 0 with each, and keeps them apart.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        import torch

        longest = max(len(row["input_ids"]) for row in rows)
        batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
        for row in rows:
            padding = longest - len(row["input_ids"])
            batch["input_ids"].append(row["input_ids"] + [self.pad_token_id] * padding)
            batch["labels"].append(row["labels"] + [IGNORE] * padding)
            batch["position_ids"].append(_positions(row.get("seq_lengths"), longest, padding))
        return {name: torch.tensor(values) for name, values in batch.items()}


def _positions(seq_lengths: list[int] | None, longest: int, padding: int) -> list[int]:
    if seq_lengths is None:  # one document; counting on through the padding lets attention stay plainly causal
        return list(range(longest))
    return [position for length in [*seq_lengths, padding] for position in range(length)]


def build_arguments(config: Config, run: RunDirectory) -> Any:
    """The `SFTConfig` of a run."""
    from trl import SFTConfig

    t, precision = config.trainer, models.resolve_precision(config).training
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
        packing=False,  # rows come packed, see data/prepare.py
        gradient_checkpointing=t.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": t.use_reentrant} if t.gradient_checkpointing else None,
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
        report_to="none",  # callbacks.py writes to metrics.jsonl and to the tracker
        disable_tqdm=True,
        trust_remote_code=config.model.trust_remote_code,
        **t.extra,
    )


def build(config: Config, run: RunDirectory, data: Prepared, callbacks: list[Any]) -> Any:
    """The SFTTrainer with the base model loaded and the adapter on it."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    data.tokenizer.padding_side = "right"
    trainer = SFTTrainer(
        model=models.load_model(config),
        args=build_arguments(config, run),
        train_dataset=data.train,
        eval_dataset=data.eval if len(data.eval) else None,
        processing_class=data.tokenizer,
        data_collator=Collator(data.tokenizer.pad_token_id),
        peft_config=adapter.build(config.peft),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # prints every log as a dict
    if models.device() == "cpu":
        loss.score_supervised_only(causal_lm(trainer.model))
    return trainer


def causal_lm(model: Any) -> Any:
    """The causal LM below an adapter, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model
