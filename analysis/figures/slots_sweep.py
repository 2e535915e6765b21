"""HarMoEny against the device memory that it has for experts."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.option_sweep import missing_sweep, plot_sweep, speed_panel, sweep_table
from analysis.present.panel import panel

NAME = "slots_sweep"
SOURCE = Source(
    "slots_sweep", minutes=1, simulated="experiment=slots_sweep backend=simulator hardware=cpu_core rounds=3"
)
_HIDDEN = panel("fetch_hidden_share")


def missing(data: FigureData) -> str | None:
    """Say that several slot counts in one run are needed."""
    return missing_sweep(data, "num_slots", SOURCE)


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per number of slots."""
    return sweep_table(data, "num_slots", (speed_panel(data), _HIDDEN))


def plot(data: FigureData) -> Figure:
    """Draw throughput and hidden fetch time against the slots."""
    return plot_sweep(data, table(data), "num_slots", "Slots per rank and layer", (speed_panel(data), _HIDDEN))
