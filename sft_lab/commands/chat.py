"""`chat RUN_DIR`: talk to a finished run's model; with --prompt TEXT one answer on standard output."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sft_lab.errors import ConfigError
from sft_lab.runs import RunDirectory


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="sft_lab chat", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={args.max_new_tokens} : too small (allowed: 1 and more)")
    run = RunDirectory.open(args.run_dir)
    run.require_adapter()
    from sft_lab.answering import Finished
    from sft_lab.logs import run_log

    with run_log():
        finished = Finished.load(run)
        if args.prompt is None:
            _talk(finished, args.max_new_tokens)
        else:
            print(finished.answer([{"role": "user", "content": args.prompt}], args.max_new_tokens))
    return 0


def _talk(finished, max_new_tokens: int) -> None:  # type: ignore[no-untyped-def]  # its class would import torch
    print("An empty line begins anew, Ctrl-D leaves.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            words = input("> ")
        except EOFError:
            print()
            return
        if not words.strip():
            messages = []
            continue
        messages.append({"role": "user", "content": words})
        answer = finished.answer(messages, max_new_tokens)
        messages.append({"role": "assistant", "content": answer})
        print(answer)
