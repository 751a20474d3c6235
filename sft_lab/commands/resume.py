"""`resume RUN_DIR`: goes on from the newest whole checkpoint, in the same directory and the same W&B run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sft_lab.runs import RunDirectory


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="sft_lab resume", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="what may have changed since the run began: data, model, or a key such as trainer.max_steps",
    )
    arguments = parser.parse_args(argv)
    run = RunDirectory.open(arguments.run_dir)
    from sft_lab.launch import resume

    resume(run, allowed=arguments.allow)
    return 0
