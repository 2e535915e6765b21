"""Throughput from batch to batch while the skew changes, under the Gini index of the experts' popularity."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.kit import iterations
from analysis.figures.kit.base import FigureData

NAME = "changing_skew"
SOURCE = iterations.SOURCE
_METRIC = "throughput_tokens_per_s"


def missing(data: FigureData) -> str | None:
    """Say that one run with changing routing is needed."""
    return iterations.missing_change(data)


def table(data: FigureData) -> pd.DataFrame:
    """Return throughput and Gini index by round and system."""
    return iterations.round_table(data, _METRIC)


def plot(data: FigureData) -> Figure:
    """Draw both over the rounds."""
    figure = iterations.plot_rounds(data, table(data), _METRIC, "Throughput (1,000 tokens/s)", 1e-3)
    figure.axes[1].set_ylim(bottom=0)
    return figure
