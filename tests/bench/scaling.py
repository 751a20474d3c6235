"""Steps a second with one process and with two, at one thread each, and what our launch adds to bare torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.table import print_table

_STEPS = 60
_WORDS = [
    "model=tiny_llama", "peft=lora_r8", "tracking=none", "data.train_rows=500", "data.eval_rows=4", "evaluation.rows=0",
    f"trainer.max_steps={_STEPS}", "trainer.per_device_train_batch_size=8", "trainer.global_batch_size=32",
    "trainer.logging_steps=10", "trainer.save_steps=1000",
]  # fmt: skip
_TWO = ["distributed=ddp", "distributed.num_processes=2"]
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
_OURS = "2 processes, our launch"
_JOINED = "2 processes, torchrun"
_PREPARED = "2 processes, torchrun on a prepared run"
_ROUNDS = 3


def scaling() -> None:
    """Each way _ROUNDS times in turn; the median of each."""
    ours = [sys.executable, "-m", "sft_lab"]
    ways = {
        "1 process": [*ours, *_WORDS],
        _OURS: [*ours, *_WORDS, *_TWO],
        _JOINED: [*_TORCHRUN, "-m", "sft_lab", *_WORDS, *_TWO],
        _PREPARED: [],  # of the second: the very script that its ranks are
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "SFT_LAB_CACHE": f"{folder}/cache"}
        _timed([*ours, *_WORDS, "trainer.max_steps=1", f"hydra.run.dir={folder}/warm"], env, Path(folder, "warm"))
        for i in range(_ROUNDS):
            for name, command in ways.items():
                run = Path(folder, f"{name}-{i}".replace(" ", "_").replace(",", ""))
                found[name].append(_timed([*command, f"hydra.run.dir={run}"], env, run) if command else _bare(run, env))
    rows = []
    alone = _median([steps for _, steps in found["1 process"]])
    for name, measured in found.items():
        wall, steps = (_median(list(values)) for values in zip(*measured, strict=True))
        rows.append([name, f"{wall:.1f}", f"{steps:.1f}", f"{steps / alone:.2f}"])
    print_table(["tiny_llama, 32 rows a step, one thread a process", "wall s", "steps/s", "of 1 process"], rows)
    rows = []
    for name in (_JOINED, _PREPARED):
        pairs = [(a, b) for (a, _), (b, _) in zip(found[_OURS], found[name], strict=True)]
        rows.append([name, f"{_median([a - b for a, b in pairs]):.1f}", f"{_median([a / b for a, b in pairs]):.2f}"])
    print_table(["our launch, in each round, against", "s more", "times as long"], rows)


def _timed(command: list[str], env: dict[str, str], run: Path) -> tuple[float, float]:
    began = time.perf_counter()
    subprocess.run(command, env=env, check=True, capture_output=True)
    wall = time.perf_counter() - began
    result = json.loads((run / "result.json").read_text())
    return wall, result["steps"] / result["train_s"]


def _bare(run: Path, env: dict[str, str]) -> tuple[float, float]:
    """The ranks' own script under bare torchrun, on the run directory that our launch has left."""
    ours = next(run.parent.glob(f"2_processes_our_launch-{run.name.rsplit('-', 1)[1]}"))
    for left in ("adapter", "checkpoints"):
        subprocess.run(["rm", "-rf", str(ours / left)], check=True)
    (ours / "metrics.jsonl").unlink()
    script = "import os, sys; sys.argv = ['', sys.argv[1], str(os.getppid())]; from sft_lab.worker import main; main()"
    file = run.parent / "rank.py"
    file.write_text(script)
    return _timed([*_TORCHRUN, str(file), str(ours)], env, ours)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
