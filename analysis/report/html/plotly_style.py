"""How interactive plots look: the colours of `analysis.present.style` in Plotly's words, whiskers, axes, margins.

Everything is built from Plotly's own classes, which refuse a name or a value that Plotly does not know.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from plotly import graph_objects as go

from analysis.present.style import PHASE_COLOURS, label, look

_SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "D": "diamond", "P": "cross", "X": "x",
    "<": "triangle-left", ">": "triangle-right", "p": "pentagon", "_": "line-ew-open", "h": "hexagon",
    "d": "diamond-tall", "*": "star", "8": "octagon",
}  # fmt: skip
_PATTERNS = ("", "\\", "x", "-", "|", "+", ".")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
INK, PAPER = "#444444", "#ffffff"
_GREY = "#999999"
#: A name with more letters takes several lines beside its bar.
_NAME_LETTERS = 18
#: What the browser draws: ``data``, a list of traces, and ``layout``.
FigureJson = dict[str, Any]


@dataclass(frozen=True)
class PlotLook:
    """Colour, marker, and what tells systems of the same colour apart.

    Attributes:
        colour: of `analysis.present.style`.
        symbol: Plotly's marker.
        pattern: on bars.
        dash: of lines.
    """

    colour: str
    symbol: str
    pattern: str
    dash: str


def looks(systems: Iterable[str]) -> dict[str, PlotLook]:
    """Return the systems' looks; those that share a colour, as variants may, differ in pattern and dash."""
    found: dict[str, PlotLook] = {}
    used: dict[str, int] = {}
    for system in systems:
        colour, marker = look(system)
        i = used.get(colour, 0)
        used[colour] = i + 1
        symbol = _SYMBOLS.get(marker, "circle")
        found[system] = PlotLook(colour, symbol, _PATTERNS[i % len(_PATTERNS)], _DASHES[i % len(_DASHES)])
    return found


def plot_text(text: str) -> str:
    """Escape what Plotly would read as markup."""
    return html.escape(text, quote=False)


def plot_label(system: str) -> str:
    """Return a system's name for a plot."""
    return plot_text(label(system))


def wrapped(text: str) -> str:
    """Break a long name into lines."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= _NAME_LETTERS:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(plot_text(line) for line in lines)


def figure_json(traces: Sequence[Any], layout: go.Layout) -> FigureJson:
    """Return traces and layout as plain data; Plotly's default template, which the page does not use, stays out."""
    return {"data": [trace.to_plotly_json() for trace in traces], "layout": layout.to_plotly_json()}


def base_layout(**options: Any) -> go.Layout:
    """Return a layout with our axes and margins, and these options."""
    axis = {"gridcolor": "#dddddd", "zeroline": False}
    return go.Layout(
        xaxis={**axis, "ticks": "outside", "ticklen": 4, "automargin": True},
        yaxis={**axis, "automargin": False},  # its labels depend on the height, so Plotly might adjust it forever
        hovermode="closest",
        margin={"l": 56, "r": 12, "t": 8, "b": 48},
        **options,
    )


def whiskers(middle: Sequence[float], low: Sequence[float], high: Sequence[float], color: str = INK) -> dict[str, Any]:
    """Return error bars that end where the intervals do."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(top - value, 0.0) for value, top in zip(middle, high, strict=True)],
        "arrayminus": [max(value - bottom, 0.0) for value, bottom in zip(middle, low, strict=True)],
        "thickness": 1.2,
        "width": 2.5,
        "color": color,
    }


def bar_marker(style: PlotLook, *, exact: bool, bound: bool) -> go.bar.Marker:
    """Return a system's bars: filled; hatched if it drops tokens, hollow if it is a bound."""
    if exact and not bound:
        pattern = {"shape": style.pattern, "fgcolor": PAPER, "bgcolor": style.colour} if style.pattern else None
        return go.bar.Marker(color=style.colour, line={"color": style.colour, "width": 1}, pattern=pattern)
    hatch = {"shape": "/", "fgcolor": style.colour, "bgcolor": PAPER, "size": 6, "solidity": 0.25}
    return go.bar.Marker(color=PAPER, line={"color": style.colour, "width": 1.3}, pattern=None if bound else hatch)


def line_marker(style: PlotLook, *, exact: bool, size: int = 8) -> go.scatter.Marker:
    """Return a system's markers on a line; hollow if it drops tokens."""
    symbol = style.symbol if exact or style.symbol.endswith("-open") else f"{style.symbol}-open"
    return go.scatter.Marker(symbol=symbol, color=style.colour, size=size, line={"color": style.colour, "width": 1.4})


def phase_marker(part: str) -> go.bar.Marker:
    """Return the bars of a part of a layer; idling is hatched."""
    if part != "idle":
        return go.bar.Marker(color=PHASE_COLOURS[part], line={"color": PAPER, "width": 0.5})
    hatch = {"shape": "/", "fgcolor": _GREY, "bgcolor": PAPER, "size": 5, "solidity": 0.2}
    return go.bar.Marker(color=PAPER, line={"color": _GREY, "width": 0.8}, pattern=hatch)
