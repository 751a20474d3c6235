"""`python -m sft_lab`: finds the verb and hands over to it. Imports no torch, so that every answer that needs none is
quick."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from sft_lab import meetings, outside
from sft_lab.errors import ConfigError, Interrupted, SftLabError

VERBS = {
    "train": "one run, or a sweep with -m (what is done without a verb)",
    "plan": "every check, and what a run will do and cost; trains nothing",
    "inspect": "rows as the model will see them, and what of them carries loss",
    "resume": "go on from the last checkpoint of a run",
    "eval": "evaluate a finished run's adapter",
    "chat": "talk to a finished run's model",
    "compare": "runs or a sweep side by side: what differs in config, result and cost",
    "repro": "run a finished run again from its record, and say whether the result is the same",
    "env": "versions, devices, what will be used and why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code (0 done, 1 failed, 2 wrong input, 130/143 interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        meeting = meetings.current()
        if meeting is not None and not meeting.group.leads:
            from sft_lab import worker

            return worker.follow()
    except SftLabError as error:
        print(f"sft_lab: {_told(error)}", file=sys.stderr)
        return error.exit_code
    if meeting is None:
        return _answer(words)
    code = 1
    try:
        code = _answer(words)
    except SystemExit as leave:  # argparse's, of --help and of what it refuses
        code = leave.code if isinstance(leave.code, int) else 2
    finally:
        meeting.dismiss(code)
    return code


def _answer(words: list[str]) -> int:
    try:
        verb, rest = _split(words)
        return int(importlib.import_module(f"sft_lab.commands.{verb}").main(rest))
    except SftLabError as error:
        print(f"sft_lab: {_told(error)}", file=sys.stderr)
        if isinstance(error, Interrupted) and error.warned and (told := outside.requeue()):
            print(f"sft_lab: {told}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `sft_lab --help | head`
        return 1
    finally:
        _flush()


def _flush() -> None:
    """What is buffered meets a closed pipe here, and not when the interpreter ends."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _split(words: list[str]) -> tuple[str, list[str]]:
    if not words or words[0].startswith(("-", "+", "~")) or "=" in words[0]:
        return "train", words
    verb, *rest = words
    if verb in VERBS:
        return verb, rest
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{verb} : neither a verb nor KEY=VALUE{hint} (verbs: {', '.join(VERBS)})")


def _told(error: SftLabError) -> str:
    problems = getattr(error, "problems", [str(error)])
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{len(problems)} problems, nothing was started", *problems])


if __name__ == "__main__":
    sys.exit(main())
