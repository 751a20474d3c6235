"""A sweep of twelve trials in one process, beside its trials' pure training and beside twelve calls of the program."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.bench.table import print_table

ROOT = Path(__file__).parents[2]
GRID = {
    "peft": ("lora_r8", "lora_r16", "lora_r64"),
    "trainer.learning_rate": ("1e-4", "2e-4"),
    "trainer.packing": ("true", "false"),
}
MODELS = {"tiny_llama": 8, "smollm2_135m": 2}  # rows a step
FIXED = (
    "trainer.max_steps=10", "trainer.max_length=256", "data.train_rows=400", "data.eval_rows=16", "evaluation.rows=0",
    "tracking=none",
)  # fmt: skip


def sweep() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as cwd:
        for model, batch in MODELS.items():
            words = [f"model={model}", f"trainer.per_device_train_batch_size={batch}", *FIXED]
            _wall_s([*words, "trainer.max_steps=1"], cwd)  # makes the model and the data, once for both
            separate = sum(_wall_s([*words, *trial], cwd) for trial in _trials())
            swept = [f"{key}={','.join(values)}" for key, values in GRID.items()]
            together = _wall_s(["-m", *words, *swept, f"sweep.name={model}"], cwd)
            results = list(Path(cwd, "outputs", "sweeps", model).glob("*/result.json"))
            assert len(results) == 12, results
            training = sum(json.loads(file.read_text())["train_s"] for file in results)
            rows.append(
                [model, *(f"{s:.1f}" for s in (training, together, separate)), f"{together / training:.2f}",
                 f"{together / separate:.2f}"]
            )  # fmt: skip
            print_table(_HEADER, rows[-1:])
    if len(rows) > 1:
        print_table(_HEADER, rows)


_HEADER = ["12 trials of 10 steps", "training s", "sweep s", "12 calls s", "sweep / training", "sweep / calls"]


def memory() -> None:
    """Resident memory of a sweep's process after each of twenty trials, and its slope once the first four are over."""
    resident_mb: list[float] = []
    rates = ",".join(f"{1e-4 * (n + 1):.1e}" for n in range(20))
    words = ["-m", "model=tiny_llama", *FIXED, f"trainer.learning_rate={rates}", "sweep.name=memory"]
    with tempfile.TemporaryDirectory() as cwd:
        command = [sys.executable, "-u", "-m", "sft_lab", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("trained "):
                    resident_mb.append(psutil.Process(process.pid).memory_info().rss / 1e6)
    late = resident_mb[4:]
    slope = statistics.linear_regression(range(len(late)), late).slope
    header = ["20 trials in one process", "MB after 1", "after 5", "after 20", "MB a trial, from the 5th"]
    cells = [f"{resident_mb[n]:.0f}" for n in (0, 4, 19)]
    print_table(header, [["tiny_llama", *cells, f"{slope:+.2f}"]])


def _trials() -> list[list[str]]:
    return [[f"{key}={v}" for key, v in zip(GRID, values, strict=True)] for values in itertools.product(*GRID.values())]


def _wall_s(words: list[str], cwd: str) -> float:
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "sft_lab", *words], cwd=cwd, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began
