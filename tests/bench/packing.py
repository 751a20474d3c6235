"""Real tokens a second of packed and unpacked training, ours beside TRL's SFTTrainer as it comes.

Everything else is alike: SmolLM2-135M-Instruct in float32, LoRA of rank 16 on all linear layers, one optimizer step a
micro-batch of per_device_train_batch_size=4, each row once. TRL flattens the four packs of 1024 tokens to one row,
whose attention grows with its square; with a batch of one pack it is least behind.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.table import print_table

ROWS = 64
ROUNDS = 3
MAX_LENGTH = 1024
BATCH = 4  # rows or packs of a micro-batch
# Tokens of prompt and answer in the first 512 rows of an instruction data set (alpaca_en of GPT-4-LLM) for SmolLM2's
# tokenizer: the minimum, every 5 %, the maximum. Its template adds 32 tokens a row; answers are 74 % of all tokens.
PROMPT = (4, 7, 8, 9, 10, 11, 11, 12, 13, 14, 15, 16, 17, 19, 21, 23, 26, 28, 34, 42, 151)
ANSWER = (1, 7, 10, 14, 17, 23, 31, 43, 58, 80, 98, 123, 152, 184, 216, 248, 277, 309, 354, 388, 562)


@dataclass
class Contender:
    """A trainer whose epoch is trained in slices, and what each slice took."""

    trainer: Any
    items: Any  # the epoch in its order: rows or packs
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)  # tokens and padding

    def train(self, batches: Sequence[int]) -> None:
        from torch.utils.data import Subset
        from transformers import TrainerCallback

        class Clock(TrainerCallback):
            """From the first step's beginning to the last one's end, the batches in between fetched and logs written."""

            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 0:
                    self.started = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.stopped = time.perf_counter()

        rows = range(batches[0] * BATCH, min((batches[-1] + 1) * BATCH, len(self.items)))
        trainer, clock, counted = self.trainer, Clock(), _Counted(self.trainer.data_collator)
        trainer.train_dataset = self.items.select(rows) if hasattr(self.items, "select") else Subset(self.items, rows)
        trainer.data_collator = counted
        trainer.add_callback(clock)
        trainer.train()
        trainer.remove_callback(clock)
        trainer.data_collator = counted.collate
        self.seconds.append(clock.stopped - clock.started)
        self.tokens.append(counted.tokens)
        self.computed.append(counted.computed)


@dataclass
class _Counted:
    """A collator that counts what goes through it."""

    collate: Any
    tokens: int = 0
    computed: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.collate(rows)
        self.tokens += sum(len(row["input_ids"]) for row in rows)
        self.computed += batch["input_ids"].numel()
        return batch


def packing() -> None:
    import torch
    from datasets import disable_progress_bars
    from transformers.utils.logging import set_verbosity_error

    from sft_lab import embedded

    torch.set_num_threads(os.cpu_count() or 1)
    disable_progress_bars()
    set_verbosity_error()
    model = embedded.resolve("embedded:smollm2_135m")
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SFT_LAB_CACHE"] = scratch  # for the data; the model is made
        file = Path(scratch, "rows.jsonl")
        file.write_text("".join(json.dumps(row) + "\n" for row in make_rows(model)), encoding="utf-8")
        contenders = {
            "sft_lab packed": ours(model, file, packed=True),
            "sft_lab unpacked": ours(model, file, packed=False),
            "TRL packed": trls(model, file, packed=True),
            "TRL unpacked": trls(model, file, packed=False),
        }
        for batches in zip(*([[0], *_slices(c)] for c in contenders.values()), strict=True):  # the first warms up
            for contender, own in zip(contenders.values(), batches, strict=True):
                contender.train(own)
    _show(contenders)


def make_rows(model: str) -> list[dict[str, Any]]:
    """Conversations of random words, each word a token, of the lengths above."""
    from transformers import AutoTokenizer

    vocabulary = sorted(AutoTokenizer.from_pretrained(model).get_vocab())
    words = [token[1:] for token in vocabulary if token[0] == "Ġ" and token[1:].isascii() and token[1:].isalpha()]
    draw = random.Random(0)

    def texts(quantiles: tuple[int, ...]) -> list[str]:
        at = (np.arange(ROWS) + 0.5) / ROWS  # evenly, so that few rows have the lengths of many
        lengths = np.interp(at, np.linspace(0, 1, len(quantiles)), quantiles).round().astype(int)
        return [" ".join(draw.choices(words, k=n)) for n in draw.sample(lengths.tolist(), ROWS)]

    pairs = zip(texts(PROMPT), texts(ANSWER), strict=True)
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in pairs
    ]


def ours(model: str, file: Path, packed: bool) -> Contender:
    from sft_lab import config as configs
    from sft_lab import trainer as trainers
    from sft_lab.data.prepare import prepare
    from sft_lab.runs import RunDirectory

    config = configs.to_config(
        configs.compose(
            [
                "model=smollm2_135m", f"model.path={model}", "peft=lora_r16", "tracking=none",
                "data=from_file", f"data.path={file}", f"trainer.packing={str(packed).lower()}",
                f"trainer.max_length={MAX_LENGTH}", f"trainer.per_device_train_batch_size={BATCH}",
                "trainer.precision=fp32",
            ]
        )
    )  # fmt: skip
    trainer = trainers.build(config, RunDirectory(file.parent / f"run_{packed}"), prepare(config), [])
    trainer.args.save_strategy = "no"
    return Contender(trainer, trainer.train_dataset)


def trls(model: str, file: Path, packed: bool) -> Contender:
    """Bare SFTTrainer with its defaults, but for what would differ from ours."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=SFTConfig(
            output_dir=str(file.parent / f"trl_{packed}"),
            packing=packed,
            max_length=MAX_LENGTH,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(file), split="train", cache_dir=str(file.parent / "hf")),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0, target_modules="all-linear"),
    )
    trainer.remove_callback(PrinterCallback)
    return Contender(trainer, trainer.train_dataset.shuffle(seed=0))


def _slices(contender: Contender) -> list[list[int]]:
    """The numbers of its micro-batches, as many in each round."""
    batches = -(-len(contender.items) // BATCH)
    return [part.tolist() for part in np.array_split(np.arange(batches), ROUNDS)]


def _show(contenders: dict[str, Contender]) -> None:
    speeds = {name: np.array(c.tokens[1:]) / np.array(c.seconds[1:]) for name, c in contenders.items()}
    totals = {name: sum(c.tokens[1:]) / sum(c.seconds[1:]) for name, c in contenders.items()}
    rows = []
    for name, c in contenders.items():
        ratios = [
            f"{totals[name] / totals[other]:.2f} ({min(each):.2f} - {max(each):.2f})"
            for other in ("TRL packed", "TRL unpacked")
            for each in [speeds[name] / speeds[other]]
        ]
        padding = 1 - sum(c.tokens[1:]) / sum(c.computed[1:])
        spread = f"{totals[name]:.0f} ({min(speeds[name]):.0f} - {max(speeds[name]):.0f})"
        rows.append([name, str(sum(c.tokens[1:])), spread, *ratios, f"{padding:.1%}"])
    title = f"packing, {ROWS} rows in {ROUNDS} rounds"
    header = [title, "real tokens", "real tokens/s (rounds)", "x TRL packed", "x TRL unpacked", "padding"]
    print_table(header, rows)
