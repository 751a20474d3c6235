"""Preparing a million short rows: that memory stays flat, and what the second run costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.table import print_table

COUNTS = (100_000, 1_000_000)
# The largest of the process and its workers, each by itself, in kB as Linux counts.
PROGRAM = """
import json, resource, sys, time
started = time.perf_counter()
from sft_lab import config as configs
from sft_lab.data.prepare import prepare
config = configs.to_config(configs.compose(sys.argv[1:]))
ready = time.perf_counter()
data = prepare(config)
ended = time.perf_counter()
peak = [resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({"rows": len(data.train), "import_s": ready - started, "s": ended - ready, "peak": peak,
                  "cache": data.facts["cache"].split(",")[0].split(" (")[0]}))
"""


def million() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"SFT_LAB_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        for count in COUNTS:
            file = Path(folder, f"{count}.jsonl")
            with open(file, "w", encoding="utf-8") as out:
                for i in range(count):
                    row = {"prompt": f"what is {i} plus {i}?", "completion": f"it is {2 * i}, of course"}
                    out.write(json.dumps(row) + "\n")
            words = ["model=tiny_llama", "data=from_file", f"data.path={file}", "data.num_proc=2", "tracking=none"]
            for run in ("first", "second"):
                done = subprocess.run(
                    [sys.executable, "-c", PROGRAM, *words], env=environment, capture_output=True, text=True, check=True
                )
                seen = json.loads(done.stdout.splitlines()[-1])
                own, worker = (f"{peak / 1e6:.0f} MB" for peak in seen["peak"])
                rows.append([f"{seen['rows']:,} rows, {run} run", seen["cache"], f"{seen['s']:.1f}", own, worker])
    print_table(["preparing, 2 processes", "cache", "s", "peak memory", "of a worker"], rows)
