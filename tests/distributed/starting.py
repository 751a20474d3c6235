"""Runs of several ranks as the tests start them: one thread a rank, the tiny model, shims on PYTHONPATH."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file

from tests.conftest import ROOT

SHIMS = ROOT / "tests" / "shims"
TWENTY = [
    "model=tiny_llama", "peft=lora_r8", "peft.lora_dropout=0", "tracking=none", "data.train_rows=200", "data.eval_rows=4",
    "evaluation.rows=3", "evaluation.max_new_tokens=4", "trainer.max_steps=20", "trainer.per_device_train_batch_size=2",
    "trainer.global_batch_size=8", "trainer.logging_steps=5", "trainer.learning_rate=2e-3",
]  # fmt: skip

# Ranks add the same numbers in another order. A gradient is a sum over a batch's tokens and the layer's width, of at most
# 8 rows x 150 tokens x 64 numbers: rounding makes sqrt(76,800) x 2^-24 of it, and Adam, which divides the gradient by its
# own size, moves a weight by no more than the learning rate times that, at each of the 20 steps. Twice, one for each side.
TOLERANCE = 2 * 20 * 2e-3 * (8 * 150 * 64) ** 0.5 * 2**-24


def environment(*shims: str) -> dict[str, str]:
    paths = [*(str(SHIMS / shim) for shim in shims), os.environ["PYTHONPATH"]]
    return {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def apart(one: Path, other: Path) -> float:
    """The largest difference between two runs' adapters, which have the same tensors."""
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()
