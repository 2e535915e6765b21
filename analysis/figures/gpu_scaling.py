"""Throughput and idle share against the number of GPUs, a column of panels per value of a second option."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.lines import summary_lines
from analysis.present.layout import PAGE_IN, axis_label, entries_of, new_figure, set_caption, set_legend
from analysis.present.panel import IDLE_SHARE, THROUGHPUT

NAME = "gpu_scaling"
SOURCE = Source("paper_gpus", minutes=None, simulated="experiment=paper_gpus router.skew=0.0,0.9")
_AXIS = "world_size"
_PANELS = (THROUGHPUT, IDLE_SHARE)


def missing(data: FigureData) -> str | None:
    """Say that several numbers of GPUs, and several values of one other option, are needed."""
    if _AXIS not in data.axes or data.summary[_AXIS].nunique() < 2:
        return f"needs several numbers of GPUs: {SOURCE.command}"
    if len(data.axes) != 2 or data.summary[_other(data)].nunique() < 2:
        return f"needs several values of one more option, such as the skew: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return both metrics per point and system."""
    columns = [f"{panel.column}{end}" for panel in _PANELS for end in ("", "_low", "_high")]
    return data.summary[[*data.axes, "system", *columns]]


def plot(data: FigureData) -> Figure:
    """Draw a line per system in every panel; rows of panels share their vertical axis."""
    summary, other = data.summary, _other(data)
    values = sorted(summary[other].unique())
    figure = new_figure(PAGE_IN, 4.4)
    panels = figure.subplots(len(_PANELS), len(values), sharex=True, sharey="row", squeeze=False)
    for column, value in enumerate(values):
        part = summary[summary[other] == value]
        for axes, panel in zip(panels[:, column], _PANELS, strict=True):
            summary_lines(axes, part, _AXIS, panel.column, panel.scale)
            if column == 0:
                axes.set_ylabel(axis_label(panel.label))
        panels[0, column].set_title(f"{other.rpartition('.')[2].capitalize()} {value:g}"
                                    if isinstance(value, int | float) else f"{other} {value}", loc="left")  # fmt: skip
        panels[-1, column].set_xlabel("GPUs")
    panels[0, 0].set_xscale("log", base=2)
    panels[0, 0].set_xticks(ranks := sorted(summary[_AXIS].unique()), [str(n) for n in ranks])
    panels[0, 0].minorticks_off()
    for row in panels:
        row[0].set_ylim(bottom=0)
    set_legend(figure, entries_of(panels[0, 0]))
    set_caption(figure, data.caption)
    return figure


def _other(data: FigureData) -> str:
    (other,) = [axis for axis in data.axes if axis != _AXIS]
    return other
