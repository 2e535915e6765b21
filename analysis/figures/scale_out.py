"""Throughput and idle share against the number of GPUs."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.figures.kit.bars import draw_caption
from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import PAGE_IN, panel_title
from analysis.present.style import label, look

NAME = "scale_out"
SOURCE = Source("scale_out", minutes=None, simulated="experiment=scale_out")
_AXIS = "world_size"
_PANELS = (
    ("throughput_tokens_per_s", "Throughput (1,000 tokens/s), higher is better", 1e-3),
    ("idle_share", "Idle share of the MoE layers (%), lower is better", 100.0),
)


def missing(data: FigureData) -> str | None:
    """Say that several numbers of GPUs are needed."""
    if _AXIS not in data.axes or data.summary[_AXIS].nunique() < 2:
        return "needs several numbers of ranks: python run.py experiment=scale_out"
    if data.summary.duplicated([_AXIS, "system"]).any():
        return f"needs one run per {_AXIS}; what differs between these besides it, is for several figures"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return both metrics per number of GPUs and system."""
    return data.summary[[*data.axes, "system", *(column for column, *_ in _PANELS)]]


def plot(data: FigureData) -> Figure:
    """Draw a line per system; throughput on two logarithmic axes, with what perfect scaling would give."""
    figure = Figure(figsize=(PAGE_IN, 3.9))
    panels = figure.subplots(1, 2)
    for axes, (column, title, scale) in zip(panels, _PANELS, strict=True):
        for system, rows in data.summary.groupby("system", sort=False):
            ordered = rows.sort_values(_AXIS)
            style = look(str(system))
            values = ordered[column] * scale
            axes.plot(ordered[_AXIS], values, marker=style.marker, color=style.colour, label=label(str(system)))
        axes.set_title(panel_title(title, 2), loc="left")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("GPUs")
    first = data.summary[data.summary[_AXIS] == data.summary[_AXIS].min()]
    per_gpu = float((first["throughput_tokens_per_s"] / first[_AXIS]).max()) * _PANELS[0][2]
    ends = [data.summary[_AXIS].min(), data.summary[_AXIS].max()]
    panels[0].plot(ends, [per_gpu * n for n in ends], color="#555555", linewidth=0.8, linestyle=":", label="Perfect")
    panels[0].set_yscale("log")
    panels[1].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="upper center", ncols=5, frameon=False)
    bottom = draw_caption(figure, data.caption) / figure.get_figheight()
    figure.tight_layout(rect=(0, bottom, 1, 0.93))
    return figure
