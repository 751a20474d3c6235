"""What trials will take, before the first has run: rough, and told as such."""

from __future__ import annotations

import functools
import time
from typing import Any

from sft_lab import model as models
from sft_lab.schema import Config

_SIZE = 1024  # of the square matrices that are multiplied to learn how fast this machine is
_USED_S = 0.2  # seconds spent on that
_SHARE = 0.55  # of a training step's time goes to matrix products, seen on SmolLM2-135M on two cores
_STEP_S = 0.03  # of a step that does not depend on the model's size: batches, optimizer, logging


def training_s(config: Config, report: dict[str, Any]) -> float:
    """Seconds that a run with this preflight report will train, without evaluation.

    A matrix product costs 2 operations a weight and token: once forward, once for the gradients of activations, once
    more for those of the weights where they are trained, and again where checkpointing computes forward twice.
    """
    parameters, tokens = report["parameters"], report["tokens_per_step"] * report["steps"]
    computed = tokens / max(1 - report["tokens"]["padding_share"], 0.01)
    passes = 2 + (config.peft.method == "none") + config.trainer.gradient_checkpointing
    operations = 2 * passes * parameters["total"] * computed
    precision = models.resolve_precision(config).training
    return operations / (_operations_a_second(precision) * _SHARE) + report["steps"] * _STEP_S


@functools.cache
def _operations_a_second(precision: str) -> float:
    """How fast this machine multiplies matrices in a precision."""
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    factor = torch.randn(_SIZE, _SIZE, generator=torch.Generator().manual_seed(0)).to(models.device(), dtype)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < _USED_S:
        (factor @ factor)[0, 0].item()  # waits for the device
        done += 1
    return 2 * _SIZE**3 * done / (time.perf_counter() - began)
