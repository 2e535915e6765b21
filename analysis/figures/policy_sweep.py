"""Throughput and time to first token of policies against router skew: the paper's comparison of scheduling policies."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.data.paper_values import router_is
from analysis.figures.kit.bars import Comparison, compare, comparison_table
from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.lines import decimal_log, published_points, summary_lines
from analysis.figures.kit.policies import policies_only
from analysis.present.layout import COLUMN_IN, axis_label, entries_of, new_figure, set_caption, set_legend
from analysis.present.panel import TTFT, TTFT_PER_SEQUENCE

NAME = "policy_sweep"
SOURCE = Source(
    "policy_sweep",
    minutes=4,
    simulated="experiment=policy_sweep backend=simulator hardware=dgx1_v100 world_size=8 model=switch_base_128 "
    "model.random_weights=true batch_size=16 seq_len=1024 rounds=5 router.skew=0,0.5,0.9",
)
_AXIS = "router.skew"
#: With a larger ratio between slowest and fastest the time's axis is logarithmic.
_LINEAR_UP_TO = 4


def missing(data: FigureData) -> str | None:
    """Say that several policies at several skews are needed."""
    if _AXIS not in data.axes or data.summary[_AXIS].nunique() < 2:
        return f"needs several skews: {SOURCE.command}"
    summary = policies_only(data).summary
    if summary["system"].nunique() < 2:
        return f"needs several policies: {SOURCE.command}"
    if summary.duplicated([_AXIS, "system"]).any():
        return f"needs one run per skew; what differs between these besides {_AXIS}, is for several figures"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per point and policy, and the published values that are drawn."""
    return comparison_table(_compare(data), data.axes, _AXIS)


def plot(data: FigureData) -> Figure:
    """Draw a panel per metric and in it a line per policy."""
    summary, metrics, published, note = _compare(data)
    figure = new_figure(COLUMN_IN, 1.1 + 1.6 * len(metrics))
    panels = figure.subplots(len(metrics), 1, sharex=True)
    for axes, panel in zip(panels, metrics, strict=True):
        summary_lines(axes, summary, _AXIS, panel.column, panel.scale, apart=True)
        published_points(axes, published, _AXIS, panel.column, panel.scale)
        axes.set_ylabel(axis_label(panel.label))
        values = summary[panel.column]
        if panel in (TTFT, TTFT_PER_SEQUENCE) and values.max() > _LINEAR_UP_TO * values.min():
            decimal_log(axes)
        else:
            axes.set_ylim(bottom=0)
    panels[-1].set_xticks(skews := sorted(summary[_AXIS].unique()), [f"{skew:g}" for skew in skews])
    panels[-1].set_xlabel("Router skew")
    set_legend(figure, entries_of(*panels))
    set_caption(figure, " ".join([data.caption, note]).strip())
    return figure


def _compare(data: FigureData) -> Comparison:
    policies = policies_only(data)
    return compare(policies, policies.summary, _AXIS, "skew", lambda run: router_is(run, "PaperSkewRouter"), at=0.0)
