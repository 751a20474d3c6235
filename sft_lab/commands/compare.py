"""`compare DIR...`: runs and sweeps side by side, best first: what differs in config, result and cost."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft_lab import directories

if TYPE_CHECKING:
    from sft_lab.sweep.ranking import Verdict
    from sft_lab.sweep.records import Comparison


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    _check(args)
    from sft_lab.sweep import ranking, records

    comparison = records.read(args.directories)
    verdict = ranking.judge(comparison, args.objective, args.direction)
    if args.html:
        from sft_lab.sweep import report

        report.write(comparison, verdict, args.html)
    if args.json:
        _print_json(comparison, verdict)
    elif args.csv:
        _print_csv(comparison, verdict)
    else:
        from sft_lab.sweep import terminal

        if not args.html:
            terminal.show(comparison, verdict)
        terminal.say_verdict(verdict)
        if args.html:
            print(f"report: {args.html}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sft_lab compare", description=__doc__)
    parser.add_argument("directories", metavar="DIR", nargs="+", help="a run directory, or a sweep's")
    parser.add_argument(
        "--objective", metavar="NAME", default="", help="the metric to rank by (default: the sweep's, or eval_loss)"
    )
    parser.add_argument(
        "--direction",
        choices=("auto", "minimize", "maximize"),
        default="auto",
        help="which way it is better (default: less of a loss, more of anything else)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document on standard output")
    form.add_argument("--csv", action="store_true", help="a line a run on standard output")
    parser.add_argument("--html", metavar="FILE", type=Path, help="a page with plots, to open in a browser")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.html is not None:
        directories.require_page(args.html, "--html")


# ------------------------------------------------------------------------------------------------ for a script


def _print_json(comparison: Comparison, verdict: Verdict) -> None:
    from sft_lab.runs import to_json
    from sft_lab.sweep import table

    best, leader = verdict.best, verdict.leader
    document = {
        "objective": verdict.objective,
        "direction": verdict.direction,
        "verdict": {"kind": verdict.kind, "sentence": verdict.sentence},
        "best": best.name if best else None,
        "leader": leader.name if leader else None,
        "noise": verdict.noise,
        "notes": verdict.notes,
        "keys": comparison.keys,
        "runs": table.rows(comparison, verdict),
        "groups": [
            {"runs": [record.name for record in group.records], "n": group.n, "mean": group.mean, "sd": group.sd}
            for group in verdict.groups
        ],
        "left_out": [entry for sweep in comparison.sweeps for entry in sweep.left_out],
    }
    print(to_json(document))


def _print_csv(comparison: Comparison, verdict: Verdict) -> None:
    from sft_lab.sweep import table
    from sft_lab.sweep.differences import shown

    flat = []
    for row in table.rows(comparison, verdict):
        values = {name: value for name, value in row.items() if name not in ("config", "metrics")}
        values |= {name: shown(value) for name, value in row["config"].items()} | row["metrics"]
        flat.append(values)
    writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
