"""The one layout of figures: sizes, legend and caption, made to be printed as they are, no letter below 7 points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, cast

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.collections import LineCollection
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from results_schema.atomic import atomic_path

#: Widths in inches of a column and of both columns of a printed page.
COLUMN_IN, PAGE_IN = 3.4, 7.0
_CAPTION_POINTS = 7
#: Width of a letter on average, of the caption and of the legend, and of what stands before a legend's label.
_LETTER_POINTS, _LEGEND_LETTER_POINTS, _HANDLE_POINTS = 3.8, 3.9, 25.0
_TITLE_LETTER_POINTS = 4.2
#: An axis label with more letters takes two lines.
_LABEL_LETTERS = 20


def new_figure(width_in: float, height_in: float) -> Figure:
    """Return a figure that keeps room for its legend above and its caption below."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def save_figure(figure: Figure, folder: Path, name: str) -> Path:
    """Save a figure as PNG, whose path is returned, and as PDF; then its layout is fixed."""
    # `Figure.savefig` would draw each twice, the first time for a layout that drawing works out anyway.
    figure.set_dpi(mpl.rcParams["savefig.dpi"])
    with atomic_path(folder / f"{name}.png") as temporary:
        cast(Any, FigureCanvasAgg(figure)).print_png(temporary)
    figure.set_layout_engine("none")
    with atomic_path(folder / f"{name}.pdf") as temporary:
        cast(Any, FigureCanvasPdf(figure)).print_pdf(temporary)
    return folder / f"{name}.png"


def set_caption(figure: Figure, caption: str) -> None:
    """Write what the numbers were measured on below the panels."""
    figure.supxlabel(
        fill(caption, _letters_per_line(figure)), x=0.01, ha="left", fontsize=_CAPTION_POINTS, color="#444444"
    )


def _letters_per_line(figure: Figure) -> int:
    """Return how many letters of a caption fit beside each other."""
    return int(figure.get_figwidth() * 72 / _LETTER_POINTS)


def panel_title(title: str, num_panels: int) -> str:
    """Break a title at its last comma where so many panels beside each other leave no room for it on one line."""
    if len(title) <= 0.92 * PAGE_IN * 72 / num_panels / _TITLE_LETTER_POINTS:
        return title
    return ",\n".join(title.rsplit(", ", 1))


def axis_label(text: str) -> str:
    """Break a long label into two lines of about the same length, never within parentheses."""
    if len(text) <= _LABEL_LETTERS:
        return text
    words = text[: text.index(" (")].split(" ") if " (" in text else text.split(" ")
    breaks = [len(" ".join(words[:i])) for i in range(1, len(words) + (" (" in text))]
    at = min(breaks, key=lambda i: max(i, len(text) - i - 1), default=None)
    return text if at is None else f"{text[:at]}\n{text[at + 1 :]}"


def set_legend(figure: Figure, entries: Mapping[str, Artist]) -> None:
    """Draw one legend above all panels, in as many columns as the width allows.

    Beside bars, published values (markers) stand last, and after them bounds (lines across a group).
    """
    has_bars = any(isinstance(handle, BarContainer) for handle in entries.values())

    def order(entry: tuple[str, Artist]) -> int:
        return 2 if isinstance(entry[1], LineCollection) else int(has_bars and isinstance(entry[1], Line2D))

    entries = dict(sorted(entries.items(), key=order))
    figure.legend(
        entries.values(), entries.keys(), loc="outside upper center", frameon=False, fontsize=7,
        ncols=_num_columns([len(name) for name in entries], figure.get_figwidth() * 72),
        columnspacing=1.0, handletextpad=0.5, handlelength=1.9, borderaxespad=0.1, labelspacing=0.3,
    )  # fmt: skip


def _num_columns(lengths: Sequence[int], width_points: float) -> int:
    """Return the most columns that fit, filled evenly from top to bottom as legends are."""
    for columns in range(len(lengths), 1, -1):
        rows = -(-len(lengths) // columns)
        if -(-len(lengths) // rows) < columns:
            continue  # the last column would be empty
        widest = [max(lengths[i : i + rows]) for i in range(0, len(lengths), rows)]
        if sum(_HANDLE_POINTS + _LEGEND_LETTER_POINTS * letters for letters in widest) <= width_points:
            return columns
    return 1


def entries_of(*panels: Axes) -> dict[str, Artist]:
    """Return what panels show, by label."""
    entries: dict[str, Artist] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(map(str, labels), handles, strict=True))
    return entries
