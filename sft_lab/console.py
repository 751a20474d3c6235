"""What a person at the terminal sees; plain lines where there is none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text


class Terminal(Console):
    """A console that a training outlives: Rich's own ends the program where nobody reads what it prints."""

    def on_broken_pipe(self) -> None:
        """What comes from now on goes nowhere, what other processes print there too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


console = Terminal(highlight=False, soft_wrap=True)


def show_facts(facts: dict[str, str]) -> None:
    """The resolved facts of a run, before it starts."""
    if not console.is_terminal:
        for name, value in facts.items():
            console.print(f"{name}: {value}", markup=False)
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table)


_STYLES = {"error": "bold red", "warning": "yellow", "fact": "dim"}


def show_findings(findings: Sequence[dict[str, Any]], ids: int) -> None:
    """What the preflight found, a line each, with the first `ids` rows that show it below."""
    width = max(len(finding["name"]) for finding in findings)
    for finding in findings:
        level = Text(f"{finding['level']:<8}", style=_STYLES[finding["level"]])
        console.print(level + Text(f"{finding['name']:<{width}}  {finding['message']}"))
        for row in finding["rows"][:ids]:
            say(f"{'':<{width + 10}}{row}")
        if len(finding["rows"]) > ids:
            say(f"{'':<{width + 10}}and {len(finding['rows']) - ids} more")


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; a cell that is too wide is folded, so that nothing is lost."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def say(text: str) -> None:
    console.print(text, markup=False)


class Progress:
    """Step, loss, tokens a second and the time left."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._total = 0

    def start(self, total: int, step: int) -> None:
        self._total = total
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._bar.add_task("", total=total, completed=step, numbers="")
            self._bar.start()

    def step(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def report(self, event: dict[str, Any]) -> None:
        if event["split"] == "eval":
            say(f"step {event['step']}: eval loss {event['loss']:.4f}")
            return
        numbers = f"loss {event['loss']:.4f}  {event['tokens_per_s']:.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], numbers=numbers)
            return
        left = event["time_s"] / event["step"] * (self._total - event["step"])
        say(f"step {event['step']}/{self._total}  {numbers}  {left:.0f} s left")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
