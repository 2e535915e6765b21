"""Throughput and time to first token against router skew: the paper's main figure."""

from __future__ import annotations

from textwrap import fill

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.bars import bars_legend, grouped_bars
from analysis.figures.base import FigureData

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
        skews = sorted(data.summary[_AXIS].unique())
        grouped_bars(axes, data.summary, _AXIS, skews, column, scale)
        axes.set_xticks(range(len(skews)), [f"{skew:g}" for skew in skews])
        axes.set_title(f"{title}, {direction}", fontsize=9, loc="left")
        axes.set_xlabel("Router skew (share of assignments to the hot experts)")
        axes.set_ylim(bottom=0)
    rows, height = bars_legend(figure, panels[0]), figure.get_figheight()
    figure.text(0.01, 0.05 / height, fill(data.caption, 180), fontsize=6.5, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, 0.22 / height, 1, 1 - (0.1 + 0.19 * rows) / height))
    return figure
