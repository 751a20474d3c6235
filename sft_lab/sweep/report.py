"""The page of a comparison: one HTML file that needs no network, for whoever was not at the terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go
from jinja2 import Template
from plotly.offline import get_plotlyjs

from sft_lab.data.view import page_template, printable
from sft_lab.runs import write_text
from sft_lab.sweep import curves, figures, table
from sft_lab.sweep.axes import axis_of
from sft_lab.sweep.differences import differing, shown, tied
from sft_lab.sweep.effects import by_effect
from sft_lab.sweep.ranking import Verdict
from sft_lab.sweep.records import Comparison, Record

_AXES = 10  # of parallel coordinates
_PAIRED = 6  # parameters that the heat map offers pairs of
_ANSWERS_OF = 3  # configs whose answers are shown side by side
_PROMPTS = 12


def write(comparison: Comparison, verdict: Verdict, file: Path, title: str = "") -> None:
    """Write the page, whole or not at all; links to the runs are relative to where it lies."""
    page = _page().render(
        title=title or _title(comparison),
        verdict=verdict,
        facts=_facts(comparison, verdict),
        keys=comparison.keys,
        metrics=table.metric_names(comparison, verdict),
        costs=table.COSTS,
        rows=[row | _links(row, file) for row in table.rows(comparison, verdict)],
        groups=[group for group in verdict.groups if verdict.noise is not None],
        plots=_plots(comparison, verdict),
        samples=_samples(verdict),
        left_out=[(sweep.name, entry) for sweep in comparison.sweeps for entry in sweep.left_out],
        plotly_js=get_plotlyjs(),
    )
    write_text(file, page)


@cache
def _page() -> Template:
    filters: dict[str, Callable[..., Any]] = {
        "shown": shown,
        "text": lambda value: "–" if value is None else printable(str(value)),
        "brief": table.brief,
        "told": lambda value, name: table.told(name, value),
    }
    return page_template("report.html.jinja", filters)


def _title(comparison: Comparison) -> str:
    names = [sweep.name for sweep in comparison.sweeps]
    return f"Sweep {', '.join(names)}" if names else f"{len(comparison.records)} runs"


def _facts(comparison: Comparison, verdict: Verdict) -> dict[str, str]:
    states: dict[str, int] = {}
    for record in comparison.records:
        states[record.state] = states.get(record.state, 0) + 1
    spent = sum(record.train_s or 0 for record in comparison.records)
    facts = {
        "runs": ", ".join(f"{count} {state}" for state, count in sorted(states.items(), key=lambda item: -item[1])),
        "ranked by": f"{verdict.objective}, {verdict.direction}" if verdict.objective else "nothing",
        "noise of seeds": "unknown" if verdict.noise is None else f"{verdict.noise:.2g} (standard deviation, pooled)",
        "training time": table.told("train_s", spent),
        "trained on": f"{sum(record.tokens or 0 for record in comparison.records):,} tokens in all",
        "sampler": ", ".join(sorted({sweep.sampler for sweep in comparison.sweeps if sweep.sampler})),
        "left out": str(sum(len(sweep.left_out) for sweep in comparison.sweeps) or ""),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _links(row: dict[str, Any], file: Path) -> dict[str, str]:
    """Relative, so that the page and the runs can be moved together."""
    there = quote(os.path.relpath(row["path"], file.resolve().parent))
    log = Path(row["path"]) / "train.log"
    url = row["wandb_url"]
    return {
        "href": f"{there}/" if Path(row["path"]).is_dir() else "",
        "log_href": f"{there}/train.log" if log.is_file() else "",
        "wandb_href": url if url.startswith(("https://", "http://")) else "",
    }


# ----------------------------------------------------------------------------------------------------------- plots


def _plots(comparison: Comparison, verdict: Verdict) -> list[dict[str, Any]]:
    """{"id", "title", "note", "figures": [{"name", "json"}]}: where there are several figures, a choice of them."""
    plots = []
    if drawn := curves.curves(comparison, verdict):
        plots.append(_plot("curves", "Curves", "Point at a line for its trial.", [("", drawn)]))
    keys = tied(verdict.ranked, differing(verdict.ranked))
    if not keys or len(verdict.ranked) < 2:
        return plots
    axes, sizes = by_effect(verdict, [axis_of(key, verdict.ranked) for key in keys])
    moving = "; ".join(f"{', '.join(others)} with {key}" for key, others in keys.items() if others)
    together = f" Moving together: {moving}." if moving else ""
    plots.append(
        _plot(
            "parallel",
            "All parameters of each trial",
            "A line a trial, from the parameter with the largest effect to the objective; the best is thick."
            + together,
            [("", figures.parallel(verdict, axes[:_AXES]))],
        )
    )
    effects = figures.effects(verdict, axes[:_AXES], sizes[:_AXES])
    outside = " Trials far worse than the rest lie outside: a double click shows them."
    plots.append(
        _plot(
            "effects",
            f"{verdict.objective} by each parameter",
            "A dot a trial, a bar the mean; a percentage is the share of the objective's variance that goes with the "
            f"parameter, whatever else differed.{outside if effects.layout.yaxis.range else ''}",
            [("", effects)],
        )
    )
    varied = [axis for axis in axes if axis.key not in ("seed", "data.seed")][:_PAIRED]
    pairs = [(f"{a.key} and {b.key}", figures.heat_map(verdict, a, b)) for a, b in combinations(varied, 2)]
    if pairs:
        plots.append(_plot("heat", "Two parameters", "The mean of the trials in each cell.", pairs))
    return plots


def _plot(name: str, title: str, note: str, drawn: Sequence[tuple[str, go.Figure]]) -> dict[str, Any]:
    choices = []
    for label, figure in drawn:
        figure.update_layout(template="none", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
        # in a script element only `<` could end it
        choices.append({"name": label, "json": figure.to_json().replace("<", "\\u003c")})
    return {"id": name, "title": title, "note": note, "figures": choices}


# --------------------------------------------------------------------------------------------------------- samples


def _samples(verdict: Verdict) -> dict[str, Any]:
    """Prompts, and what was expected, what the model said untrained, and what the best configs' best runs say."""
    shown_of: list[Record] = []
    for group in [group for group in verdict.groups if group.records[0].samples][:_ANSWERS_OF]:
        first = shown_of[0] if shown_of else group.records[0]
        shown_of.append(max(group.records, key=lambda record: len(_asked(record) & _asked(first))))
    rows = []
    for sample in shown_of[0].samples[:_PROMPTS] if shown_of else []:
        answers = [_same(record, sample).get("answer") for record in shown_of]
        rows.append({key: sample.get(key) for key in ("prompt", "reference", "answer_before")} | {"answers": answers})
    return {"names": [record.name for record in shown_of], "rows": rows}


def _asked(record: Record) -> set[str]:
    """The prompts of a run's samples; another seed holds out other rows."""
    return {str(sample.get("prompt")) for sample in record.samples}


def _same(record: Record, sample: dict[str, Any]) -> dict[str, Any]:
    """The record's answer to the same prompt."""
    return next((other for other in record.samples if other.get("prompt") == sample.get("prompt")), {})
