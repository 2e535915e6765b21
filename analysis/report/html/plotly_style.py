"""How systems and phases look in interactive plots: the colours of `analysis.present.style`, in Plotly's words."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

from analysis.present.style import label, look

_SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "D": "diamond", "P": "cross", "X": "x",
    "<": "triangle-left", ">": "triangle-right", "p": "pentagon", "_": "line-ew-open", "h": "hexagon",
    "d": "diamond-tall", "*": "star", "8": "octagon",
}  # fmt: skip
_PATTERNS = ("", "\\", "x", "-", "|", "+", ".")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


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
