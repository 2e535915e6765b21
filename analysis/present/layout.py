"""Sizes and places that figures share, so that they can be printed as they are: no letter below 7 points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

#: Widths in inches of a column and of both columns of a printed page.
COLUMN_IN, PAGE_IN = 3.4, 7.0
_CAPTION_POINTS = 7
#: Width of a letter on average, of the caption and of the legend, and of what stands before a legend's label.
_LETTER_POINTS, _LEGEND_LETTER_POINTS, _HANDLE_POINTS = 3.8, 3.9, 25.0
_TITLE_LETTER_POINTS = 4.3


def new_figure(width_in: float, height_in: float) -> Figure:
    """Return a figure that keeps room for its legend above and its caption below."""
    return Figure(figsize=(width_in, height_in), layout="constrained")


def set_caption(figure: Figure, caption: str) -> None:
    """Write what the numbers were measured on below the panels."""
    figure.supxlabel(
        fill(caption, letters_per_line(figure)), x=0.01, ha="left", fontsize=_CAPTION_POINTS, color="#444444"
    )


def letters_per_line(figure: Figure) -> int:
    """Return how many letters of a caption fit beside each other."""
    return int(figure.get_figwidth() * 72 / _LETTER_POINTS)


def panel_title(title: str, num_panels: int) -> str:
    """Break a title at its last comma where so many panels beside each other leave no room for it on one line."""
    if len(title) <= 0.92 * PAGE_IN * 72 / num_panels / _TITLE_LETTER_POINTS:
        return title
    return ",\n".join(title.rsplit(", ", 1))


def set_legend(figure: Figure, entries: Mapping[str, Artist]) -> None:
    """Draw one legend above all panels, bounds last, in as many columns as the width allows."""
    entries = dict(sorted(entries.items(), key=lambda entry: isinstance(entry[1], LineCollection)))
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


def entries_of(axes: Axes) -> dict[str, Artist]:
    """Return what a panel shows, by label."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))
