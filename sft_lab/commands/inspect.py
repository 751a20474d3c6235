"""`inspect [overrides | RUN_DIR]`: rows as they train, token by token, and what of them carries loss."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft_lab import command_line, directories
from sft_lab import config as configs
from sft_lab.errors import ConfigError
from sft_lab.runs import RunDirectory, to_json, write_text

if TYPE_CHECKING:
    from sft_lab.data.prepared import Prepared
    from sft_lab.schema import Config


def main(argv: Sequence[str]) -> int:
    args, words = _parser().parse_known_args(argv)
    _check(args)
    typed = command_line.parse(words).overrides
    of_run = [word for word in typed if "=" not in word and not word.startswith(("+", "~"))]
    if of_run and len(words) > 1:
        raise ConfigError(f"inspect {' '.join(words)} : a run's directory or overrides, not both")
    run = RunDirectory.open(of_run[0]) if of_run else None
    config = configs.load(run.config) if run else command_line.one_run(words, "inspect")[0]
    from sft_lab.data import inspection, view
    from sft_lab.logs import run_log

    with run_log():
        data = _data(config, run)
        rows = inspection.views(config, data, inspection.choose(data, args.rows, args.row, args.by_length))
    if args.html:
        title = f"Rows of {run.path if run else config.data.path or config.data.source}"
        write_text(Path(args.html), view.as_html(rows, title))
    if args.json:
        print(to_json({**view.as_json(rows), "left_out": inspection.left_out(data)}))
    if args.html or args.json:
        return 0
    from sft_lab.console import console

    console.print(view.as_text(rows, console))
    for line in inspection.left_out_lines(data):
        console.print(view.printable(line), markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft_lab inspect", description=__doc__, epilog="Other words are a run's directory, or overrides."
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many (default 3)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", metavar="ID", help="this one: FILE:NUMBER, or NUMBER where there is one file")
    which.add_argument("--longest", dest="by_length", action="store_const", const="longest", help="the longest rows")
    which.add_argument("--shortest", dest="by_length", action="store_const", const="shortest", help="the shortest")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument("--html", metavar="FILE", help="a page to open in a browser")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.rows < 1:
        raise ConfigError(f"--rows={args.rows} : too small (allowed: 1 and more)")
    if args.html is not None:
        directories.require_page(Path(args.html), "--html")


def _data(config: Config, run: RunDirectory | None) -> Prepared:
    from sft_lab.data.prepare import prepare
    from sft_lab.data.prepared import Prepared

    if run is None:
        return prepare(config)
    if not run.data.is_dir():
        raise ConfigError(f"{run.path}: this run ended before its data was written")
    return Prepared.load(run, config.model.trust_remote_code)
