"""Throughput and time to first token of policies against router skew: the paper's comparison of scheduling policies."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.base import FigureData, Source
from analysis.figures.layout import COLUMN_IN, entries_of, new_figure, set_caption, set_legend
from analysis.figures.lines import decimal_log, summary_lines
from analysis.figures.policies import policies_only

NAME = "policy_sweep"
SOURCE = Source(
    "policy_sweep",
    minutes=5,
    simulated="experiment=policy_sweep backend=simulator hardware=dgx1_v100 world_size=8 model=switch_base_128 "
    "model.random_weights=true batch_size=16 seq_len=1024 rounds=5 router.skew=0,0.5,0.9",
)
_AXIS = "router.skew"
#: With a larger ratio between slowest and fastest the time's axis is logarithmic.
_LINEAR_UP_TO = 4
_PANELS = (
    ("throughput_tokens_per_s", "Throughput\n(1,000 tokens/s)", 1e-3),
    ("ttft_s", "Time to first\ntoken (s)", 1.0),
)


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
    """Return medians and intervals per point and policy."""
    columns = [f"{name}{end}" for name, *_ in _PANELS for end in ("", "_low", "_high")]
    return policies_only(data).summary[[*data.axes, "system", *columns]]


def plot(data: FigureData) -> Figure:
    """Draw a panel per metric and in it a line per policy."""
    summary = policies_only(data).summary
    figure = new_figure(COLUMN_IN, 4.3)
    panels = figure.subplots(len(_PANELS), 1, sharex=True)
    for axes, (column, title, scale) in zip(panels, _PANELS, strict=True):
        summary_lines(axes, summary, _AXIS, column, scale, apart=True)
        axes.set_ylabel(title)
    panels[0].set_ylim(bottom=0)
    if summary["ttft_s"].max() > _LINEAR_UP_TO * summary["ttft_s"].min():
        decimal_log(panels[1])
    else:
        panels[1].set_ylim(bottom=0)
    panels[-1].set_xticks(skews := sorted(summary[_AXIS].unique()), [f"{skew:g}" for skew in skews])
    panels[-1].set_xlabel("Router skew")
    set_legend(figure, entries_of(panels[0]))
    set_caption(figure, data.caption)
    return figure
