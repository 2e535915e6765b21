"""Throughput, its ratio to the best at no skew, and time to first token against router skew: the main figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.data.paper_values import router_is
from analysis.data.twins import twins_of
from analysis.figures.kit.bars import Comparison, compare, comparison_table, grouped_bars, limit_height
from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import PAGE_IN, entries_of, new_figure, panel_title, set_caption, set_legend
from analysis.present.panel import RATIO_TO_NO_SKEW
from analysis.present.style import label
from analysis.present.table import has_no_skew
from results_schema.manifest import SIMULATOR

NAME = "skew_sweep"
SOURCE = Source("skew_sweep", minutes=5, simulated="experiment=paper_skew")
_AXIS = "router.skew"
#: With more bars than these the panels stand one above the other, so that bars stay wide enough to be told apart.
_BARS_SIDE_BY_SIDE = 30


def missing(data: FigureData) -> str | None:
    """Say that a sweep over the skew is needed, unless there is one."""
    if _AXIS not in data.axes or data.summary[_AXIS].nunique() < 2:
        return f"needs several skews: {SOURCE.command}"
    if data.summary.duplicated([_AXIS, "system"]).any():
        return f"needs one run per skew; what differs between these besides {_AXIS}, is for several figures"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per point and system, and the published values that are drawn."""
    return comparison_table(_compare(data), data.axes, _AXIS)


def plot(data: FigureData) -> Figure:
    """Draw a group of bars per skew, a bar per system with its 95 % interval, and bounds as lines across the group."""
    frame, panels, published, note = _compare(data)
    skews = sorted(frame[_AXIS].unique())
    stacked = len(panels) > 2 or len(skews) * frame["system"].nunique() > _BARS_SIDE_BY_SIDE
    figure = new_figure(PAGE_IN, 3.3 * len(panels) if stacked else 3.7)
    drawn = figure.subplots(*((len(panels), 1) if stacked else (1, len(panels))))
    for axes, panel in zip(drawn, panels, strict=True):
        grouped_bars(axes, frame, _AXIS, skews, panel.column, panel.scale, published)
        axes.set_xticks(range(len(skews)), [f"{skew:g}" for skew in skews])
        axes.set_title(panel_title(panel.title, 1 if stacked else len(panels)), loc="left")
        axes.set_xlabel("Router skew (share of assignments to the hot experts)")
        limit_height(axes)
        if panel == RATIO_TO_NO_SKEW:
            axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
            for twins in twins_of(data.runs):
                axes.axhspan(twins.low, twins.high, color="#cccccc", linewidth=0, zorder=0)
    set_legend(figure, entries_of(*drawn))
    set_caption(figure, f"{data.caption} {note}".strip())
    return figure


def _compare(data: FigureData) -> Comparison:
    found = compare(data, data.summary, _AXIS, "skew", lambda run: router_is(run, "PaperSkewRouter"), at=0.0)
    if not has_no_skew(data.summary) or set(data.summary["backend"]) == {SIMULATOR}:
        return found  # simulations need no pairing: the throughputs say it, beside the published ones
    throughput, *others = found.panels
    note = f"{found.caption} Ratios are to the best exact system at no skew in the same rounds."
    for twins in twins_of(data.runs):
        note += f" Grey: how far {label(twins.one)} and {label(twins.other)} come out apart, which do the same."
    return found._replace(panels=[throughput, RATIO_TO_NO_SKEW, *others], caption=note.strip())
