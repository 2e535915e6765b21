"""HarMoEny against its threshold: the paper's eq_tokens figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.base import FigureData
from analysis.figures.option_sweep import Panel, missing_sweep, plot_sweep, sweep_table

NAME = "threshold_sweep"
_PANELS = (
    Panel("throughput_ratio_to_best_baseline", "Throughput, ratio to the best baseline, higher is better"),
    Panel("num_fetches", "Fetches per batch"),
)


def missing(data: FigureData) -> str | None:
    """Say that several thresholds in one run are needed."""
    return missing_sweep(data, "threshold", "threshold_sweep")


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per threshold."""
    return sweep_table(data, "threshold", _PANELS)


def plot(data: FigureData) -> Figure:
    """Draw throughput and fetches against the threshold."""
    return plot_sweep(data, table(data), "threshold", "Threshold (tokens that are worth a fetch)", _PANELS)
