"""Throughput and idle share against the number of GPUs."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.lines import summary_lines
from analysis.present.layout import PAGE_IN, entries_of, new_figure, panel_title, set_caption, set_legend
from analysis.present.panel import IDLE_SHARE, THROUGHPUT

NAME = "scale_out"
SOURCE = Source("scale_out", minutes=None, simulated="experiment=scale_out")
_AXIS = "world_size"
_PANELS = (THROUGHPUT, IDLE_SHARE)


def missing(data: FigureData) -> str | None:
    """Say that several numbers of GPUs are needed."""
    if _AXIS not in data.axes or data.summary[_AXIS].nunique() < 2:
        return f"needs several numbers of ranks: {SOURCE.command}"
    if data.summary.duplicated([_AXIS, "system"]).any():
        return f"needs one run per {_AXIS}; what differs between these besides it, is for several figures"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return both metrics per number of GPUs and system."""
    return data.summary[[*data.axes, "system", *(panel.column for panel in _PANELS)]]


def plot(data: FigureData) -> Figure:
    """Draw a line per system; throughput on two logarithmic axes, with a line in proportion to the number of GPUs."""
    figure = new_figure(PAGE_IN, 3.7)
    panels = figure.subplots(1, 2)
    for axes, panel in zip(panels, _PANELS, strict=True):
        summary_lines(axes, data.summary, _AXIS, panel.column, panel.scale)
        axes.set_title(panel_title(panel.title, 2), loc="left")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("GPUs")
    _draw_proportional(panels[0], data.summary)
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    set_legend(figure, entries_of(panels[0]))
    set_caption(figure, data.caption)
    return figure


def _draw_proportional(axes: Axes, summary: pd.DataFrame) -> None:
    """Draw what the best system on the fewest GPUs would have on more, in proportion; others may have more."""
    fewest, most = summary[_AXIS].min(), summary[_AXIS].max()
    first = summary[summary[_AXIS] == fewest]
    per_gpu = float((first[THROUGHPUT.column] / first[_AXIS]).max()) * THROUGHPUT.scale
    ends = [fewest, most]
    axes.plot(ends, [per_gpu * n for n in ends], color="#555555", linewidth=0.8, linestyle=":", label="In proportion")
