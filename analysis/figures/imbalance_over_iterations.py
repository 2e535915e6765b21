"""Imbalance from batch to batch while the skew changes, under the Gini index of the experts' popularity."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.kit import iterations
from analysis.figures.kit.base import FigureData
from analysis.present.panel import IMBALANCE

NAME = "imbalance_over_iterations"
SOURCE = iterations.SOURCE


def missing(data: FigureData) -> str | None:
    """Say that one run with changing routing is needed."""
    return iterations.missing_change(data)


def table(data: FigureData) -> pd.DataFrame:
    """Return imbalance and Gini index by round and system."""
    return iterations.round_table(data, IMBALANCE.column)


def plot(data: FigureData) -> Figure:
    """Draw both over the rounds."""
    figure = iterations.plot_rounds(data, table(data), IMBALANCE)
    figure.axes[1].set_ylim(bottom=0.95)
    return figure
