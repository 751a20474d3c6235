"""What the plots of a comparison share: colours, texts, and many lines in one trace.

All plots are SVG: what needs WebGL stays empty on a machine without it. A browser draws 200 trials quickly only if they
are few traces, so trials of like objective share one, with gaps between their lines. Colours run from blue (best) over
grey to orange (worst), which all kinds of colour blindness tell apart, and are neither too dark for a dark page nor too
light for a light one.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from sft_lab.data.view import printable
from sft_lab.sweep.ranking import Verdict
from sft_lab.sweep.records import Record

SCALE = ["#0a7fd6", "#8fa3b5", "#a39c94", "#c78a5c", "#d9591c"]
BINS = 9
FEW = 30  # trials that need not be drawn thin
UNRANKED = "#888888"


class Colours:
    """The colour of a run by its objective; the worst tenth share one, so that a run that diverged hides nothing."""

    def __init__(self, verdict: Verdict):
        values = [verdict.value(record) for record in verdict.ranked]
        self.best = values[0] if values else 0.0
        self.worst = values[int(0.9 * (len(values) - 1))] if len(values) > 9 else values[-1] if values else 0.0
        self.scale = sample_colorscale(SCALE, [i / (BINS - 1) for i in range(BINS)])
        self._verdict = verdict

    def bin(self, record: Record) -> int:
        if self.worst == self.best:
            return 0
        share = abs(self._verdict.value(record) - self.best) / abs(self.worst - self.best)
        return min(BINS - 1, int(share * BINS))

    def axis(self) -> dict[str, Any]:
        """Plotly's colour axis for the objective."""
        low, high = sorted((self.best, self.worst))
        scale = SCALE if self._verdict.direction == "minimize" else SCALE[::-1]
        bar = {
            "title": {"text": plain(self._verdict.objective)},
            "thickness": 12,
            "outlinewidth": 0,
            "tickformat": ".4~g",
        }
        return {"cmin": low, "cmax": high, "colorscale": scale, "colorbar": bar}


def text_of(record: Record, *lines: str) -> str:
    """What a pointed-at trial says; Plotly reads tags in it."""
    return "<br>".join(plain(line) for line in (record.name, *lines))


def plain(text: str) -> str:
    return html.escape(printable(text), quote=False)


def joined(lines: Sequence[tuple[list[Any], list[float], str]]) -> dict[str, list[Any]]:
    """Several lines (x, y, text) as one trace, with a gap after each.

    Plotly wants the text at every point; written out, the texts would be most of the page. `meta` holds them as pairs
    of text and how often, which the page writes out before it draws.
    """
    return {
        "x": [value for x, _, _ in lines for value in (*x, None)],
        "y": [value for _, y, _ in lines for value in (*(float(f"{number:.5g}") for number in y), None)],
        "meta": [[text, len(x) + 1] for x, _, text in lines],
    }


def add_colour_bar(figure: go.Figure, colours: Colours) -> None:
    """The scale of the objective, on a trace of no point."""
    figure.add_trace(
        go.Scatter(
            x=[None], y=[None], mode="markers", showlegend=False, marker={"color": [0], "coloraxis": "coloraxis"}
        )
    )
    figure.update_layout(coloraxis=colours.axis())
