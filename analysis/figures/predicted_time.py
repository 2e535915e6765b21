"""How well a policy predicts what its plans take: predicted against taken time of every layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import COLUMN_IN, PAGE_IN, entries_of, new_figure, set_caption, set_legend
from analysis.present.style import label, look
from analysis.present.table import without_letters, without_medians

NAME = "predicted_time"
SOURCE = Source("skew_sweep", minutes=5, simulated="experiment=skew_sweep backend=simulator hardware=h200")
#: Whose names and errors have room in a column.
_FEW_SYSTEMS = 3
_PHASES = ["dispatch_s", "compute_s", "combine_s"]


def missing(data: FigureData) -> str | None:
    """Say that a policy that predicts is needed."""
    if not any((run.layers["predicted_s"] > 0).any() for run in data.runs):
        return f"needs a system that predicts what its plans take, as harmoeny: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return, by run, system, round and layer, seconds from the plan on the slowest rank, predicted and taken."""
    frames = []
    for number, run in enumerate(data.runs):
        layers = run.layers[run.layers["predicted_s"] > 0]
        layers = layers.assign(taken_s=layers[_PHASES].sum(axis=1))
        slowest = layers.groupby(["system", "round", "layer"])[["predicted_s", "taken_s"]].max().reset_index()
        frames.append(slowest.assign(run=number))
    found = pd.concat(frames, ignore_index=True)
    return found[["run", "system", "round", "layer", "predicted_s", "taken_s"]]


def plot(data: FigureData) -> Figure:
    """Draw a dot per layer and batch beside the line on which both are equal."""
    frame = table(data)
    many = frame["system"].nunique() > _FEW_SYSTEMS
    figure = new_figure(PAGE_IN if many else COLUMN_IN, 4.2 if many else 3.2)
    axes = figure.subplots()
    for system, rows in frame.groupby("system", sort=False):
        axes.plot(
            rows["predicted_s"] * 1e3, rows["taken_s"] * 1e3, linestyle="none", marker=".", markersize=3,
            color=look(str(system)).colour, label=label(str(system)),
        )  # fmt: skip
    ends = [frame[["predicted_s", "taken_s"]].min().min() * 1e3, frame[["predicted_s", "taken_s"]].max().max() * 1e3]
    axes.plot(ends, ends, color="black", linewidth=0.7, linestyle=(0, (4, 2)), label="equal")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Predicted (ms)")
    axes.set_ylabel("Taken (ms)")
    set_legend(figure, entries_of(axes))
    errors = (frame["taken_s"] / frame["predicted_s"] - 1).abs().groupby(frame["system"], sort=False).median()
    said = ", ".join(f"{label(str(system))} {error:.1%}" for system, error in errors.items())
    caption = without_letters(without_medians(data.caption, data.summary), data.summary)
    set_caption(
        figure,
        f"{caption} A dot per MoE layer and batch: from the plan to the end of the "
        f"combine on the slowest rank. Median error: {said}.",
    )
    return figure
