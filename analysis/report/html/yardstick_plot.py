"""The interactive plot of the machine's own speed: what its yardstick took over the rounds."""

from __future__ import annotations

from plotly import graph_objects as go

from analysis.data.load import Run
from analysis.data.pairing import moved_rounds, slowest_yardstick
from analysis.report.html.plotly_style import FigureJson, base_layout, figure_json

_PARTS = {"product_s": ("matrix product", "#0072b2"), "copy_s": ("copy", "#e69f00")}
_MOVED = {"fillcolor": "#d55e00", "opacity": 0.15, "line_width": 0}


def drift(run: Run) -> FigureJson:
    """Draw what the yardstick took on the slowest rank, to its median, and mark the rounds in which it moved."""
    slowest = slowest_yardstick(run)
    relative = slowest / slowest.median()
    at = [index + moment / 2 for index, moment in relative.index]
    traces = [
        go.Scatter(
            mode="lines+markers",
            name=title,
            x=at,
            y=relative[column].tolist(),
            line={"color": colour, "width": 1.4},
            hovertemplate=f"<b>{title}</b><br>round %{{x}}: %{{y:.3f}} of its median<extra></extra>",
        )
        for column, (title, colour) in _PARTS.items()
    ]
    bands = [
        go.layout.Shape(x0=index - 0.1, x1=index + 0.6, y0=0, y1=1, yref="paper", **_MOVED)
        for index in moved_rounds(run)
    ]
    layout = base_layout(shapes=bands)
    layout.xaxis.update(title={"text": "round"}, showgrid=False)
    layout.yaxis.update(title={"text": "time to its median"}, tickformat="~r")
    return figure_json(traces, layout)
