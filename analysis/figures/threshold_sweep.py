"""HarMoEny against its threshold: the paper's eq_tokens figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.data.paper_values import load_published
from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.option_sweep import missing_sweep, plot_sweep, speed_panel, sweep_table
from analysis.present.panel import THROUGHPUT, panel

NAME = "threshold_sweep"
SOURCE = Source("threshold_sweep", minutes=1, simulated="experiment=paper_threshold")
_OPTION = "threshold"
_FETCHES = panel("num_fetches")
_TO_BEST = panel("throughput_to_best_threshold")


def missing(data: FigureData) -> str | None:
    """Say that several thresholds in one run are needed."""
    return missing_sweep(data, _OPTION, SOURCE)


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per threshold; with published values, throughput to the best threshold's."""
    panels = (speed_panel(data), _FETCHES)
    frame = sweep_table(data, _OPTION, tuple(dict.fromkeys((*panels, panel(THROUGHPUT.column)))))
    best = frame[THROUGHPUT.column].max()
    ends = ("", "_low", "_high")
    frame = frame.assign(**{f"{_TO_BEST.column}{end}": frame[f"{THROUGHPUT.column}{end}"] / best for end in ends})
    if THROUGHPUT.column != panels[0].column:
        frame = frame.drop(columns=[f"{THROUGHPUT.column}{end}" for end in ends])
    if not data.published:
        return frame.drop(columns=[f"{_TO_BEST.column}{end}" for end in ends])
    return pd.concat([frame.assign(source="ours"), _published().assign(source="published", derived=False)])


def plot(data: FigureData) -> Figure:
    """Draw throughput and fetches against the threshold."""
    frame = table(data)
    published = None
    if data.published:
        published, frame = (_TO_BEST, frame[frame["source"] == "published"]), frame[frame["source"] == "ours"]
    return plot_sweep(
        data, frame, _OPTION, "Threshold (tokens that are worth a fetch)", (speed_panel(data), _FETCHES), published
    )


def _published() -> pd.DataFrame:
    """Return the published durations as throughput relative to the best threshold's; what ran is not known."""
    found = load_published("threshold")
    return found[["system", _OPTION]].assign(**{_TO_BEST.column: found["duration_s"].min() / found["duration_s"]})
