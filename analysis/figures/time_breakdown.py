"""Where every rank's time goes in a MoE layer, phase by phase with waiting and idling: the paper's time breakdown."""

from __future__ import annotations

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.base import FigureData
from analysis.style import PHASE_COLOURS, label

NAME = "time_breakdown"
#: Parts of a layer in the order of drawing; together they are the layer.
PARTS = ("route", "metadata", "plan", "dispatch", "compute", "wait for weights", "idle", "combine")


def missing(data: FigureData) -> str | None:
    """Say that one run is needed."""
    if len(data.runs) == 1:
        return None
    return "needs one run: python run.py experiment=prefetch_ablation, or name one run's folder"


def table(data: FigureData) -> pd.DataFrame:
    """Return seconds per layer by system, rank and part: medians over rounds of means over layers."""
    layers = data.runs[0].layers
    waits = layers["fetch_wait_s"] + layers["restore_wait_s"]
    parts = pd.DataFrame(
        {
            **{phase: layers[f"{phase}_s"] for phase in ("route", "metadata", "plan", "dispatch")},
            "compute": layers["compute_s"] - waits,
            "wait for weights": waits,
            # A rank that is through with its own computation idles in combine, until the last rank joins it.
            "idle": layers[["idle_s", "combine_s"]].min(axis=1),
            "combine": (layers["combine_s"] - layers["idle_s"]).clip(lower=0),
        }
    )[list(PARTS)]
    keys = [layers[key] for key in ("system", "round", "rank")]
    by_round = parts.groupby(keys, sort=False).mean()
    medians = by_round.groupby(["system", "rank"], sort=False).median()
    return medians.add_suffix("_s").reset_index()


def plot(data: FigureData) -> Figure:
    """Draw a stacked bar per system and rank."""
    frame = table(data)
    systems = [name for name in data.runs[0].systems if name in set(frame["system"])]
    ranks = sorted(frame["rank"].unique())
    figure = Figure(figsize=(8.4, 1.6 + 0.26 * len(systems) * (len(ranks) + 1)))
    axes = figure.subplots()
    rows = [(system, rank) for system in systems for rank in ranks]
    places = np.array([i * (len(ranks) + 0.8) + r for i in range(len(systems)) for r in range(len(ranks))])
    values = frame.set_index(["system", "rank"]).loc[rows]
    left = np.zeros(len(rows))
    for part in PARTS:
        width = values[f"{part}_s"].to_numpy() * 1e3
        axes.barh(
            places,
            width,
            0.9,
            left=left,
            label=part,
            color=PHASE_COLOURS[part],
            hatch="////" if part == "idle" else None,
            edgecolor="#888888" if part == "idle" else "white",
            linewidth=0.4,
        )
        left += width
    axes.set_yticks(places, [f"{label(s)}, rank {r}" if r == ranks[0] else f"rank {r}" for s, r in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.set_xlabel("Milliseconds per MoE layer")
    figure.legend(*axes.get_legend_handles_labels(), loc="upper center", ncols=len(PARTS), frameon=False, fontsize=8,
                  columnspacing=1.2, handlelength=1.2)  # fmt: skip
    height = figure.get_figheight()
    figure.text(0.01, 0.05 / height, fill(data.caption, 150), fontsize=6.5, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, 0.3 / height, 1, 1 - 0.3 / height))
    return figure
