"""`repro RUN_DIR`: runs it again from its record in a new directory, and says whether the result is the same."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft_lab import command_line
from sft_lab.errors import ConfigError, PreflightError
from sft_lab.runs import RunDirectory, to_json

if TYPE_CHECKING:
    from sft_lab.repro import Difference
    from sft_lab.schema import Config

_THREADS = "hardware.torch_threads"


def main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    old = RunDirectory.open(args.run_dir)
    if args.run_dir_new == "":
        raise ConfigError("--run-dir= : is empty (allowed: a directory that is new or empty)")
    new = RunDirectory(args.run_dir_new or command_line.one_run([], "repro")[1])
    new.require_free()
    # one JSON document on standard output: what a run tells of itself goes beside it
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        result = _run_again(old, new, args)
    if args.json:
        print(to_json(result))
    if "refused" in result:
        raise PreflightError(result["refused"])
    if not args.json:
        print("\n".join(_told(result)))
    return 0 if result["same"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sft_lab repro",
        description=__doc__,
        epilog="Exit code 0: the same; 1: not the same, or the run failed; 2: refused, nothing was started.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument(
        "--run-dir", dest="run_dir_new", metavar="NEW_DIR", help="where it goes (default: as a run's of today)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=("data", "model"),
        help="run although this is not what was recorded; may be given twice",
    )
    return parser


def _run_again(old: RunDirectory, new: RunDirectory, args: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from sft_lab import repro
    from sft_lab.console import say
    from sft_lab.launch import start
    from sft_lab.logs import run_log

    config, record = repro.record_of(old)
    _track_apart(config)
    with run_log():
        found = repro.differences(record, config)
    refused = repro.refusals(found, args.allow)
    if refused:
        return {"differences": repro.as_dicts(found), "refused": refused}
    say("as recorded: code, packages, hardware, data and model" if not found else "not as recorded:")
    for difference in found:
        say(f"  {difference}")
    if parts := sorted({difference.part for difference in found if difference.what != _THREADS}):
        say(f"the result may differ for that: {', '.join(parts)}")
    _set_threads(found)
    start(config, new, yaml.safe_load(old.overrides.read_text(encoding="utf-8")) if old.overrides.is_file() else [])
    return {"differences": repro.as_dicts(found), **repro.compare(old, new), "run_dir": str(new.path)}


def _track_apart(config: Config) -> None:
    """A sweep's trial, run again, is not one more trial of the sweep."""
    tracking = config.tracking
    if tracking.job_type == "trial" or tracking.group == config.sweep.name:
        tracking.group = ""
    tracking.job_type = "repro"


def _set_threads(found: list[Difference]) -> None:
    """Threads share a sum out among them, and its last bits depend on how many there are."""
    import torch

    from sft_lab.console import say

    for difference in found:
        if difference.what == _THREADS:
            torch.set_num_threads(difference.recorded)
            say(f"torch is set to {difference.recorded} threads, as recorded")


def _told(result: dict[str, Any]) -> list[str]:
    lines = []
    if result["adapter_equal"]:
        lines.append("adapter: byte-equal")
    elif result["max_abs_difference"] is None:
        lines.append(f"adapter: not equal, {result['tensor']} is of one only or of another shape")
    else:
        lines.append(f"adapter: not equal, by at most {result['max_abs_difference']:g}, in {result['tensor']}")
    changed = {name: pair for name, pair in result["metrics"].items() if pair[0] != pair[1]}
    for name, (old, new) in changed.items():
        both = isinstance(old, (int, float)) and isinstance(new, (int, float))
        lines.append(f"{name}: {old} -> {new}" + (f" ({new - old:+g})" if both else ""))
    if not changed:
        lines.append(f"metrics: equal ({', '.join(result['metrics'])})")
    verdict = "the same result" if result["same"] else "not the same result"
    return [*lines, f"{verdict}: {result['run_dir']}"]
