"""Time of a whole process, from start to exit, for the answers that need no model."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.table import print_table

ROOT = Path(__file__).parents[2]
ROUNDS = 5


def startup() -> None:
    sft_lab = [sys.executable, "-m", "sft_lab"]
    commands = {
        'python -c "import hydra"': ([sys.executable, "-c", "import hydra"], 0),
        "sft_lab --help": ([*sft_lab, "--help"], 0),
        "sft_lab --cfg job": ([*sft_lab, "model=tiny_llama", "--cfg", "job"], 0),
        "sft_lab, a mistyped key": ([*sft_lab, "model=tiny_llama", "trainer.learning_rat=1e-3"], 2),
    }
    seconds: dict[str, list[float]] = {label: [] for label in commands}
    for measured in [False] + [True] * ROUNDS:  # the first round fills caches; every round runs each command once,
        for label, (command, exit_code) in commands.items():  # so that a busy machine slows all of them alike
            elapsed_s = _wall_s(command, exit_code)
            if measured:
                seconds[label].append(elapsed_s)
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    base = next(iter(medians.values()))
    rows = [
        [label, f"{median:.2f}", f"{min(seconds[label]):.2f} - {max(seconds[label]):.2f}", f"{median / base:.2f}"]
        for label, median in medians.items()
    ]
    print_table([f"start-up, median of {ROUNDS}", "wall s", "range s", "x import hydra"], rows)


def _wall_s(command: list[str], exit_code: int) -> float:
    """Seconds from start to exit, in an empty directory; a command that ends otherwise than expected is no timing."""
    with tempfile.TemporaryDirectory() as cwd:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        started = time.perf_counter()
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        elapsed_s = time.perf_counter() - started
    if done.returncode != exit_code:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}, expected {exit_code}\n{done.stderr}")
    return elapsed_s
