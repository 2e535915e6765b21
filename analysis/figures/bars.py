"""What figures share that compare systems by groups of bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from analysis.style import label, look


def grouped_bars(axes: Axes, frame: pd.DataFrame, axis: str, groups: Sequence[Any], column: str, scale: float) -> None:
    """Draw a group of bars per value, a bar per system with its 95 % interval, and bounds as lines across the group.

    Args:
        axes: where.
        frame: rows of a summary; one per value and system.
        axis: its column with the values.
        groups: the values, from left to right, at 0, 1, ...
        column: what is drawn, with its ``_low`` and ``_high``.
        scale: factor of what is drawn.
    """
    systems = list(dict.fromkeys(frame.loc[~frame["bound"], "system"]))
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        rows = frame[frame["system"] == system].set_index(axis).reindex(groups)
        exact = bool(rows["exact"].dropna().iloc[0])
        middle, low, high = (rows[f"{column}{end}"].to_numpy(dtype=float) * scale for end in ("", "_low", "_high"))
        axes.bar(
            np.arange(len(groups)) + (i - (len(systems) - 1) / 2) * width,
            middle,
            width * 0.92,
            yerr=np.maximum([middle - low, high - middle], 0),
            label=label(system) + ("" if exact else " (drops tokens)"),
            color=look(system).colour if exact else "white",
            edgecolor=look(system).colour,
            hatch="" if exact else "////",
            error_kw={"elinewidth": 0.9, "capsize": min(2.0, 12 * width), "ecolor": "#222222"},
        )
    for bound in dict.fromkeys(frame.loc[frame["bound"], "system"]):
        values = frame[frame["system"] == bound].set_index(axis).reindex(groups)[column].to_numpy(dtype=float) * scale
        left = np.arange(len(groups)) - 0.42
        axes.hlines(values, left, left + 0.84, colors=look(bound).colour, linestyles="dashed", label=label(bound))


def bars_legend(figure: Figure, axes: Axes) -> int:
    """Draw one legend above all panels, bounds last, and return its number of rows."""
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [name for name in entries if not isinstance(entries[name], LineCollection)]
    labels += [name for name in entries if name not in labels]
    columns = len(labels) if len(labels) <= 5 else 4
    figure.legend([entries[name] for name in labels], labels, loc="upper center", ncols=columns, frameon=False)
    return -(-len(labels) // columns)
