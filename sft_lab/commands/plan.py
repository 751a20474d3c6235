"""`plan [GROUP=OPTION ...] [KEY=VALUE ...]`: every check of a run before it costs anything; trains nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from sft_lab import command_line

_SHOWN = 3  # ids beside a finding; --json has them all


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sft_lab plan", description=__doc__, epilog="Other words are overrides, as of a training."
    )
    parser.add_argument("--json", action="store_true", help="one JSON document, as preflight.json of the run")
    args, words = parser.parse_known_args(argv)
    config, run_dir = command_line.one_run(words, "plan")
    from sft_lab import preflight
    from sft_lab.data.prepare import prepare
    from sft_lab.logs import run_log
    from sft_lab.runs import RunDirectory, to_json

    run = RunDirectory(run_dir)
    run.require_free()
    with run_log():
        data = prepare(config)
        report = preflight.examine(config, data, run).as_dict()
    if args.json:
        print(to_json(report))
    else:
        print(data.facts["cache"], file=sys.stderr)
        _show(report)
    return 0 if report["ok"] else 2


def _show(report: dict[str, Any]) -> None:
    """Errors first; a finding a line, with some of the rows that show it."""
    from sft_lab.console import show_findings
    from sft_lab.data.view import printable

    levels = ("error", "warning", "fact")
    findings = sorted(report["findings"], key=lambda finding: levels.index(finding["level"]))
    # a row's reason quotes the data, which must not act on the terminal
    show_findings([{**finding, "rows": [printable(row) for row in finding["rows"]]} for finding in findings], _SHOWN)
