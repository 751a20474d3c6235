"""`eval RUN_DIR [data=... data.key=...]`: evaluates a finished run's adapter, on its own held-out rows or on others."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from sft_lab import config as configs
from sft_lab.runs import RunDirectory


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="sft_lab eval", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "overrides", nargs="*", metavar="data.KEY=VALUE", help="other rows, as on a training's command line"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_intermixed_args(argv)
    run = RunDirectory.open(args.run_dir)
    run.require_adapter()
    config = configs.load(run.config)
    if args.overrides:
        config = configs.with_other_data(config, args.overrides)
    from sft_lab.answering import Finished
    from sft_lab.logs import run_log

    with run_log():
        result = Finished.load(run).evaluate(config)
    print(json.dumps(result, indent=2) if args.json else _told(result))
    return 0


def _told(result: dict[str, Any]) -> str:
    lines = [f"{result['rows']} rows of {result['source']}"]
    lines += [f"{name.replace('_', ' ')}: {value:.4f}" for name, value in result["metrics"].items()]
    return "\n".join(lines)
