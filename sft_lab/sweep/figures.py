"""The plots of parameters against the objective, as Plotly figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sft_lab.sweep.axes import Axis, positions_of
from sft_lab.sweep.differences import shown
from sft_lab.sweep.drawing import FEW, SCALE, UNRANKED, Colours, add_colour_bar, joined, plain, text_of
from sft_lab.sweep.effects import Effect, mean_by
from sft_lab.sweep.ranking import Verdict

# ---------------------------------------------------------------------------------------------- parallel coordinates


def parallel(verdict: Verdict, axes: Sequence[Axis]) -> go.Figure:
    """A line a trial over its parameters and, rightmost, its objective."""
    colours = Colours(verdict)
    low, high = sorted((colours.best, colours.worst))
    heights = [axis.spread(verdict.ranked) for axis in axes]
    places = list(range(len(axes) + 1))
    bins: dict[int, list[Any]] = {}
    for i, record in reversed(list(enumerate(verdict.ranked))):
        value = verdict.value(record)
        lines = [f"{axis.key} = {shown(record.config.get(axis.key))}" for axis in axes]
        text = text_of(record, *lines, f"{verdict.objective} = {value:.5g}")
        bins.setdefault(colours.bin(record), []).append(
            (places, [*(height[i] for height in heights), _share(value, low, high)], text)
        )
    figure, few = go.Figure(), len(verdict.ranked) <= FEW
    for place in sorted(bins, reverse=True):
        line = {"color": colours.scale[place], "width": 2.5 if few else 1.2}
        figure.add_scatter(
            **joined(bins[place]),
            mode="lines",
            line=line,
            opacity=0.9 if few else 0.7,
            showlegend=False,
            hovertemplate="%{text}<extra></extra>",
        )
    first = verdict.ranked[0]
    figure.add_scatter(
        x=places,
        y=[*(height[0] for height in heights), _share(verdict.value(first), low, high)],
        mode="lines",
        line={"color": colours.scale[0], "width": 4},
        hoverinfo="skip",  # the line below it has the text
        showlegend=False,
    )
    _add_rulers(figure, [*(axis.ticks01() for axis in axes), _objective_ticks(verdict, low, high)])
    titles = [*(axis.key for axis in axes), verdict.objective]
    figure.update_xaxes(
        tickvals=places, ticktext=_staggered(titles), side="top", range=[-0.15, len(axes) + 0.45], showgrid=False
    )
    figure.update_yaxes(visible=False, range=[-0.06, 1.06])
    figure.update_layout(height=460, hovermode="closest", margin={"t": 70})
    add_colour_bar(figure, colours)
    return figure


def _share(value: float, low: float, high: float) -> float:
    return (min(max(value, low), high) - low) / (high - low) if high > low else 0.5


def _staggered(titles: Sequence[str]) -> list[str]:
    """Long keys over each other where they would run into their neighbours."""
    return [plain(title).replace(".", ".<br>", 1) for title in titles]


def _objective_ticks(verdict: Verdict, low: float, high: float) -> list[tuple[float, str]]:
    if high == low:
        return [(0.5, f"{low:.4g}")]
    ticks = [(i / 4, f"{low + (high - low) * i / 4:.4g}") for i in range(5)]
    beyond = verdict.value(verdict.ranked[-1])
    if beyond > high:
        ticks[-1] = (1.0, f"{high:.4g} and more")
    elif beyond < low:
        ticks[0] = (0.0, f"{low:.4g} and less")
    return ticks


def _add_rulers(figure: go.Figure, ticks_of: Sequence[Sequence[tuple[float, str]]]) -> None:
    figure.update_layout(
        shapes=[
            {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "line": {"width": 1, "color": UNRANKED}}
            for x in range(len(ticks_of))
        ]
    )
    label = {"showarrow": False, "xanchor": "left", "xshift": 4, "borderpad": 1, "font": {"size": 11}}
    label |= {"name": "on lines"}  # the page gives these its own background
    figure.update_layout(
        annotations=[
            {"x": x, "y": y, "text": plain(text), **label} for x, ticks in enumerate(ticks_of) for y, text in ticks
        ]
    )


# ------------------------------------------------------------------------------------------------------- parameters


def effects(verdict: Verdict, axes: Sequence[Axis], sizes: Sequence[Effect]) -> go.Figure:
    """For each parameter, the objective of every trial by its value, and the mean of each value or interval."""
    columns = min(3, len(axes))
    count = -(-len(axes) // columns)
    titles = [f"{plain(axis.key)}<br><sup>{size.told}</sup>" for axis, size in zip(axes, sizes, strict=True)]
    figure = make_subplots(
        count, columns, subplot_titles=titles, vertical_spacing=min(0.3, 0.36 / count), horizontal_spacing=0.08
    )
    values, few = [verdict.value(record) for record in verdict.ranked], len(verdict.ranked) <= FEW
    for place, axis in enumerate(axes):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        text = [text_of(r, f"{axis.key} = {shown(r.config.get(axis.key))}") for r in verdict.ranked]
        figure.add_scatter(
            x=axis.jittered(verdict.ranked),
            y=values,
            text=text,
            mode="markers",
            marker={"color": SCALE[0], **({"size": 9, "opacity": 0.9} if few else {"size": 6, "opacity": 0.55})},
            hovertemplate=f"%{{text}}<br>{plain(verdict.objective)} = %{{y:.5g}}<extra></extra>",
            **where,
        )
        means = mean_by(verdict, axis)
        figure.add_scatter(
            x=[x for x, _, _ in means],
            y=[mean for _, mean, _ in means],
            text=[f"mean of {n}" for _, _, n in means],
            mode="lines+markers",
            line={"color": SCALE[-1], "width": 2},
            marker={"symbol": "line-ew-open", "size": 22, "line": {"width": 3}},
            hovertemplate="%{text}: %{y:.5g}<extra></extra>",
            **where,
        )
        ticks = axis.ticks()
        figure.update_xaxes(tickvals=[x for x, _ in ticks], ticktext=[plain(t) for _, t in ticks], **where)
    best, worst, typical = values[0], values[-1], Colours(verdict).worst
    if abs(worst - best) > 3 * abs(typical - best) > 0:  # one that diverged would press all others together
        margin = 0.1 * (typical - best)
        figure.update_yaxes(range=sorted((best - margin, typical + margin)))
    figure.update_layout(height=290 * count + 40, showlegend=False, hovermode="closest")
    return figure


def heat_map(verdict: Verdict, across: Axis, up: Axis) -> go.Figure:
    """The mean objective for two parameters; a cell that no trial fell into stays empty."""
    x_of, x_labels = positions_of(verdict.ranked, across)
    y_of, y_labels = positions_of(verdict.ranked, up)
    cells: dict[tuple[int, int], list[float]] = {}
    for record, x, y in zip(verdict.ranked, x_of, y_of, strict=True):
        cells.setdefault((x, y), []).append(verdict.value(record))
    grid = [[cells.get((x, y), []) for x in range(len(x_labels))] for y in range(len(y_labels))]
    figure = go.Figure(
        go.Heatmap(
            z=[[sum(cell) / len(cell) if cell else None for cell in row] for row in grid],
            text=[[f"{sum(cell) / len(cell):.4g}<br>n={len(cell)}" if cell else "" for cell in row] for row in grid],
            texttemplate="%{text}",
            textfont={"color": "#101418"},  # at least 5:1 on every colour of the scale
            hovertemplate="%{text}<extra></extra>",
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
        )
    )
    for update, axis, labels in ((figure.update_xaxes, across, x_labels), (figure.update_yaxes, up, y_labels)):
        update(
            title={"text": plain(axis.key), "standoff": 12},
            tickvals=list(range(len(labels))),
            ticktext=[plain(label) for label in labels],
            showgrid=False,
        )
    figure.update_layout(height=max(300, 70 * len(y_labels) + 120), coloraxis=Colours(verdict).axis())
    return figure
