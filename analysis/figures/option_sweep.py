"""Throughput, time to first token and idle share against any one option that has no figure of its own."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.kit.bars import grouped_bars
from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import PAGE_IN, entries_of, new_figure, set_caption, set_legend
from analysis.present.panel import IDLE_SHARE, THROUGHPUT, TTFT

NAME = "option_sweep"
SOURCE = Source(
    "batch_sweep", minutes=2, simulated="experiment=batch_sweep backend=simulator hardware=dgx_h100 world_size=8"
)
_PANELS = (THROUGHPUT, TTFT, IDLE_SHARE)
#: Options whose sweeps have figures of their own.
_OTHERS = ("router.skew", "router.case", "dataset", "world_size")


def missing(data: FigureData) -> str | None:
    """Say that a sweep over one such option is needed, unless there is one."""
    wanted = f"needs several values of one option, such as the batch size: {SOURCE.command}"
    if len(data.axes) != 1:
        return f"{wanted}; these runs differ in {', '.join(data.axes) or 'none'}"
    if data.axes[0] in _OTHERS:
        return f"{wanted}; a sweep over {data.axes[0]} has figures of its own"
    if len(_values(data)) < 2 or data.summary.assign(at=_texts(data)).duplicated(["at", "system"]).any():
        return wanted
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per value and system."""
    columns = [f"{panel.column}{end}" for panel in _PANELS for end in ("", "_low", "_high")]
    return data.summary[[*data.axes, "system", *columns]]


def plot(data: FigureData) -> Figure:
    """Draw a group of bars per value, a bar per system with its 95 % interval, and references as lines across."""
    frame, values = data.summary.assign(at=_texts(data)), _values(data)
    figure = new_figure(PAGE_IN, 2.5 * len(_PANELS))
    drawn = figure.subplots(len(_PANELS), 1, sharex=True)
    for axes, panel in zip(drawn, _PANELS, strict=True):
        grouped_bars(axes, frame, "at", values, panel.column, panel.scale)
        axes.set_title(panel.title, loc="left")
    drawn[-1].set_xticks(range(len(values)), values, rotation=30 if max(map(len, values)) > 12 else 0)
    drawn[-1].set_xlabel(data.axes[0])
    set_legend(figure, entries_of(*drawn))
    set_caption(figure, data.caption)
    return figure


def _texts(data: FigureData) -> pd.Series:
    return data.summary[data.axes[0]].map(_text)


def _text(value: Any) -> str:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):  # numbers of NumPy are Real
        return str(value)
    return f"{float(value):g}"


def _values(data: FigureData) -> list[str]:
    """Return the option's values as they are written below the bars: numbers by size, others as in the sweep."""
    found = list(data.summary[data.axes[0]])
    if all(isinstance(value, numbers.Real) for value in found):
        found.sort()
    return list(dict.fromkeys(map(_text, found)))
