"""Throughput and time to first token against router skew: the paper's main figure."""

from __future__ import annotations

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from analysis.figures.base import FigureData
from analysis.style import label, look

NAME = "skew_sweep"
_AXIS = "router.skew"
#: With more bars than these the panels stand one above the other, so that bars stay wide enough to be told apart.
_BARS_SIDE_BY_SIDE = 30
_PANELS = (
    ("throughput_tokens_per_s", "Throughput (1,000 tokens/s)", 1e-3, "higher is better"),
    ("ttft_s", "Time to first token (s)", 1.0, "lower is better"),
)
COLUMNS = tuple(f"{name}{end}" for name, *_ in _PANELS for end in ("", "_low", "_high"))


def missing(data: FigureData) -> str | None:
    """Say that a sweep over the skew is needed, unless there is one."""
    if _AXIS not in data.axes or data.summary[_AXIS].nunique() < 2:
        return "needs several skews: python run.py experiment=skew_sweep"
    if data.summary.duplicated([_AXIS, "system"]).any():
        return f"needs one run per skew; what differs between these besides {_AXIS}, is for several figures"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per point and system."""
    return data.summary[[*data.axes, "system", *COLUMNS]]


def plot(data: FigureData) -> Figure:
    """Draw a group of bars per skew, a bar per system with its 95 % interval, and bounds as lines across the group."""
    stacked = data.summary[_AXIS].nunique() * data.summary["system"].nunique() > _BARS_SIDE_BY_SIDE
    figure = Figure(figsize=(8.4, 7.0 if stacked else 3.9))
    panels = figure.subplots(*((2, 1) if stacked else (1, 2)))
    for axes, (column, title, scale, direction) in zip(panels, _PANELS, strict=True):
        _bars(axes, data, column, scale)
        axes.set_title(f"{title}, {direction}", fontsize=9, loc="left")
        axes.set_xlabel("Router skew (share of assignments to the hot experts)")
        axes.set_ylim(bottom=0)
    entries = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    labels = [name for name in entries if not isinstance(entries[name], LineCollection)]
    labels += [name for name in entries if name not in labels]  # bounds last
    columns = len(labels) if len(labels) <= 5 else 4
    figure.legend([entries[name] for name in labels], labels, loc="upper center", ncols=columns, frameon=False)
    height, rows = figure.get_figheight(), -(-len(labels) // columns)
    figure.text(0.01, 0.05 / height, fill(data.caption, 180), fontsize=6.5, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, 0.22 / height, 1, 1 - (0.1 + 0.19 * rows) / height))
    return figure


def _bars(axes: Axes, data: FigureData, column: str, scale: float) -> None:
    frame = data.summary
    skews = sorted(frame[_AXIS].unique())
    systems = list(dict.fromkeys(frame.loc[~frame["bound"], "system"]))
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        rows = frame[frame["system"] == system].set_index(_AXIS).reindex(skews)
        exact = bool(rows["exact"].dropna().iloc[0])
        middle, low, high = (rows[f"{column}{end}"].to_numpy(dtype=float) * scale for end in ("", "_low", "_high"))
        axes.bar(
            np.arange(len(skews)) + (i - (len(systems) - 1) / 2) * width,
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
        values = frame[frame["system"] == bound].set_index(_AXIS).reindex(skews)[column].to_numpy(dtype=float) * scale
        left = np.arange(len(skews)) - 0.42
        axes.hlines(values, left, left + 0.84, colors=look(bound).colour, linestyles="dashed", label=label(bound))
    axes.set_xticks(np.arange(len(skews)), [f"{skew:g}" for skew in skews])
