"""The train loss and the metrics of evaluations over the steps, as a Plotly figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sft_lab.sweep.drawing import BINS, FEW, UNRANKED, Colours, add_colour_bar, joined, plain, text_of
from sft_lab.sweep.ranking import Verdict, allowed_objectives
from sft_lab.sweep.records import Comparison, Record

_APART = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888"]  # Okabe and Ito's, and grey
_POINTS = 8_000  # of one panel's curves, all trials together


def curves(comparison: Comparison, verdict: Verdict) -> go.Figure | None:
    """The train loss and the metrics of evaluations over the steps, a line a trial; None where nothing was logged."""
    records = [*verdict.ranked, *(record for record, _ in verdict.unranked)]
    names = ["train_loss", *dict.fromkeys(["eval_loss", *allowed_objectives(comparison.records)])]
    panels = {name: [(r, *line) for r in records if (line := _curve(r, name))] for name in names}
    panels = {name: lines for name, lines in panels.items() if any(len(steps) > 1 for _, steps, _ in lines)}
    if not panels:
        return None
    count = -(-len(panels) // 2)
    figure = make_subplots(
        count, min(2, len(panels)), subplot_titles=list(map(plain, panels)), vertical_spacing=0.32 / (count + 1)
    )
    drawn = [record for record in records if any(record is other for lines in panels.values() for other, _, _ in lines)]
    colours, few = Colours(verdict), len(drawn) <= len(_APART)
    for place, lines in enumerate(panels.values()):
        where = {"row": place // 2 + 1, "col": place % 2 + 1}
        for trace in _apart(lines, drawn, place == 0) if few else _binned(lines, verdict, colours):
            figure.add_trace(go.Scatter(mode="lines+markers" if few else "lines", **trace), **where)
        if min(y for _, _, values in lines for y in values) > 0 and _wide([v for _, _, line in lines for v in line]):
            figure.update_yaxes(type="log", **where)
        else:
            figure.update_yaxes(rangemode="nonnegative", **where)
    figure.update_xaxes(title_text="step", title_standoff=4)
    figure.update_layout(height=340 * count + 60, hovermode="closest", legend={"orientation": "h", "y": -0.12})
    if not few and verdict.ranked:
        add_colour_bar(figure, colours)
    return figure


def _curve(record: Record, name: str) -> tuple[list[int], list[float]] | None:
    split, key = ("train", "loss") if name == "train_loss" else ("eval", "loss" if name == "eval_loss" else name)
    points = {}
    for event in record.events:
        value, step = event.get(key), event.get("step")
        if event.get("split") != split or not isinstance(step, int) or not isinstance(value, float | int):
            continue
        if math.isfinite(value):
            points[step] = value
    return (list(points), list(points.values())) if points else None


def _thinned(values: list[Any], most: int) -> list[Any]:
    """At most `most` of the values, evenly, with the first and the last."""
    if len(values) <= most:
        return values
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _apart(lines: Sequence[Any], drawn: list[Record], legend: bool) -> Iterator[dict[str, Any]]:
    """A trace a trial, each with its own colour and an entry in the legend, ranked ones by rank."""
    colour_of = {record.name: colour for record, colour in zip(drawn, _APART, strict=False)}
    for record, steps, values in lines:
        yield {
            "x": _thinned(steps, 2000),
            "y": _thinned(values, 2000),
            "name": plain(record.name),
            "legendgroup": record.name,
            "showlegend": legend,
            "line": {"color": colour_of[record.name], "width": 2, "dash": "solid" if record.finished else "dot"},
            "marker": {"size": 4},
            "hovertemplate": f"{text_of(record)}<br>step %{{x}}: %{{y:.5g}}<extra></extra>",
        }


def _binned(lines: Sequence[Any], verdict: Verdict, colours: Colours) -> Iterator[dict[str, Any]]:
    """A trace for each bin of the objective, the best on top; what could not be ranked lies below, dotted."""
    most = max(20, _POINTS // len(lines))
    ranked = {id(record) for record in verdict.ranked}
    bins: dict[int, list[Any]] = {}
    for record, steps, values in lines:
        x, y = _thinned(steps, most), _thinned(values, most)
        place = colours.bin(record) if id(record) in ranked else BINS
        bins.setdefault(place, []).append((x, y, text_of(record)))
    for place in sorted(bins, reverse=True):
        unranked = place == BINS
        line = {"color": UNRANKED if unranked else colours.scale[place], "width": 1 if len(lines) > FEW else 2}
        yield {
            **joined(bins[place]),
            "line": line | ({"dash": "dot"} if unranked else {}),
            "opacity": 0.7,
            "showlegend": False,
            "hovertemplate": "%{text}<br>step %{x}: %{y:.5g}<extra></extra>",
        }
    for record, steps, values in lines:
        if verdict.ranked and record is verdict.ranked[0]:
            line = {"color": colours.scale[0], "width": 4}
            yield {"x": steps, "y": values, "line": line, "showlegend": False, "hoverinfo": "skip"}


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 20
