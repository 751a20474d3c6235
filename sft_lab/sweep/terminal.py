"""A comparison at the terminal: the table and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sft_lab.console import Terminal, console, say
from sft_lab.data.view import printable
from sft_lab.sweep import table
from sft_lab.sweep.differences import tied
from sft_lab.sweep.ranking import Verdict
from sft_lab.sweep.records import Comparison

_NARROW = 40  # characters of a config's value in the table; --json and --csv have it whole
_PIPE = 1000  # characters of a line where no terminal folds it
_TITLES = {"tokens_per_s": "tokens/s", "peak_memory_bytes": "memory", "train_s": "time"}


def show(comparison: Comparison, verdict: Verdict) -> None:
    """As much as the terminal is wide enough for; a pipe takes lines of any length."""
    wide = Terminal(width=_PIPE, height=_PIPE, highlight=False)  # given both, it asks no terminal
    screen = console if console.is_terminal else wide
    metrics = table.metric_names(comparison, verdict)
    grid = _table(comparison, verdict, comparison.keys, metrics, table.COSTS)
    if Measurement.get(wide, wide.options, grid).minimum > screen.width:
        keys = tied(comparison.records, comparison.keys)
        grid = _table(comparison, verdict, list(keys), metrics[:1], ())
        for key, others in keys.items():
            if others:
                say(f"{', '.join(others)}: moving with {key}")
        left_out = ", ".join([*metrics[1:], *_TITLES.values()])
        say(f"The terminal is too narrow for {left_out}; --csv, --json and --html have them.")
    screen.print(grid, soft_wrap=False)


def _table(
    comparison: Comparison, verdict: Verdict, keys: Sequence[str], metrics: Sequence[str], costs: Sequence[str]
) -> Table:
    grid = Table(box=None, padding=(0, 1), header_style="bold", pad_edge=False)
    grid.add_column("#", justify="right", no_wrap=True)
    grid.add_column("run", overflow="fold", min_width=12)
    for key in keys:
        grid.add_column(key, overflow="fold", min_width=4)
    noise = "?" if verdict.noise is None else f"{verdict.noise:.2g}"
    for title in (*metrics, f"behind (± {noise})", *(_TITLES[cost] for cost in costs)):
        grid.add_column(title, justify="right", overflow="fold", min_width=6)
    grid.add_column("state", overflow="fold")
    for row in table.rows(comparison, verdict):
        grid.add_row(*_cells(row, keys, metrics, costs), style=None if row["rank"] else "dim")
    return grid


def _cells(row: dict[str, Any], keys: Sequence[str], metrics: Sequence[str], costs: Sequence[str]) -> list[Any]:
    values = [printable(table.brief(row["config"][key])) for key in keys]
    return [
        str(row["rank"] or ""),
        Text(printable(row["name"])),  # no markup is read in a Text
        *(Text(value if len(value) <= _NARROW else f"{value[: _NARROW - 1]}…") for value in values),
        *(table.told(name, row["metrics"].get(name)) for name in metrics),
        "" if row["behind"] is None else f"+{row['behind']:.4f}" if row["behind"] else "",
        *(table.told(name, row[name]) for name in costs),
        Text(printable(row["state"])),
    ]


def say_verdict(verdict: Verdict) -> None:
    """The sentence, what to mind about it, and what could not be ranked."""
    say("")
    say(printable(verdict.sentence))
    for note in verdict.notes:
        say(printable(note))
    if verdict.unranked:
        say("not ranked:")
    for record, why in verdict.unranked:
        say(printable(f"  {record.name}: {why}" if why == record.state else f"  {record.name} ({record.state}): {why}"))
