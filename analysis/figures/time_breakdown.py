"""Where every rank's time goes in a MoE layer, phase by phase with waiting and idling: the paper's time breakdown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.data.breakdown import PARTS, breakdown
from analysis.data.load import Run
from analysis.data.paper_values import CITATION, load_published, on_papers_machine, router_is
from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import PAGE_IN, entries_of, new_figure, set_caption, set_legend
from analysis.present.style import PHASE_COLOURS, label
from analysis.present.table import without_letters, without_whiskers

NAME = "time_breakdown"
SOURCE = Source("prefetch_ablation", minutes=1, simulated="experiment=paper_breakdown")
_TIME = "Milliseconds per MoE layer"
#: Inches per bar.
_BAR = 0.26
#: With more bars than fit on a page only two ranks per system are drawn.
_MOST_BARS = 32


def missing(data: FigureData) -> str | None:
    """Say that one run is needed."""
    if len(data.runs) == 1:
        return None
    return f"needs one run: {SOURCE.command}, or name one run's folder"


def table(data: FigureData) -> pd.DataFrame:
    """Return seconds per layer by system, rank and part: medians over rounds of means over layers.

    Published rows, where they are drawn, are means over ranks too and have no rank.
    """
    frame = breakdown(data.runs[0].layers)
    return pd.concat([frame, _published()]) if _beside(data) else frame


def plot(data: FigureData) -> Figure:
    """Draw a stacked bar per system and rank, and below them the published ones."""
    frame = table(data)
    ours, published = frame[frame["rank"].notna()], frame[frame["rank"].isna()]
    systems = [name for name in data.runs[0].systems if name in set(ours["system"])]
    few = len(ours) > _MOST_BARS
    rows = [(system, rank) for system in systems for rank in _ranks(ours[ours["system"] == system], few=few)]
    per_system = len(rows) // len(systems)
    positions = [i * (per_system + 0.8) + r for i in range(len(systems)) for r in range(per_system)]
    heights = [len(systems) * (per_system + 1), len(published) + 1.0][: 1 if published.empty else 2]
    same = _same_conditions(data.runs[0])
    figure = new_figure(PAGE_IN, 1.3 + _BAR * sum(heights) + 0.7 * (len(heights) - 1))
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False, sharex=same)[:, 0]
    names = [f"{label(s)}, rank {r}" if i % per_system == 0 else f"rank {r}" for i, (s, r) in enumerate(rows)]
    _stack(panels[0], ours.set_index(["system", "rank"]).loc[rows], positions, names)
    panels[-1].set_xlabel(_TIME)
    caption = without_letters(without_whiskers(data.caption, data.summary), data.summary)
    if few:
        caption += " Of every system the ranks that idle least and most; all are in the CSV file."
    if not published.empty:
        names = [f"{label(name)}, published" for name in published["system"]]
        _stack(panels[1], published, range(len(published)), names)
        scale = "" if same else "\nAnother machine and model, on its own scale"
        panels[1].set_title(f"Published, {CITATION}; means of ranks and layers{scale}", loc="left")
        if not same:
            panels[0].set_xlabel(_TIME)
        caption += " Published bars: waiting for weights is part of compute, route is all that is in no other phase."
    set_legend(figure, entries_of(panels[0]))
    set_caption(figure, caption)
    return figure


def _ranks(rows: pd.DataFrame, *, few: bool) -> list[int]:
    """Return the ranks of a system that are drawn: all, or those that idle least and most."""
    by_idle = rows.sort_values("idle_s", kind="stable")["rank"].astype(int).tolist()
    return [by_idle[0], by_idle[-1]] if few else sorted(by_idle)


def _stack(axes: Axes, values: pd.DataFrame, positions: Sequence[float] | range, names: Sequence[str]) -> None:
    """Draw one bar per row from its parts, from left to right."""
    left = np.zeros(len(values))
    for part in PARTS:
        width = values[f"{part}_s"].to_numpy(dtype=float) * 1e3
        axes.barh(
            positions,
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
    axes.set_yticks(positions, names)
    axes.set_ylim(max(positions) + 0.7, min(positions) - 0.7)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def _beside(data: FigureData) -> bool:
    return data.published is True or (data.published is None and _same_conditions(data.runs[0]))


def _same_conditions(run: Run) -> bool:
    """Tell whether a run did what the published breakdown did: ten hot experts on rank 0, 48 sequences per GPU."""
    batches = set(run.iterations["num_sequences"])
    return on_papers_machine(run) and router_is(run, "SkewRouter", num_hot=10) and batches == {48 * 8}


def _published() -> pd.DataFrame:
    """Return the published breakdowns in our parts, seconds per layer over both stacks."""
    found = load_published("breakdown")
    columns = [column for column in found if str(column).endswith("_s")]
    means = found.groupby("system", sort=False)[columns].mean()
    means = means.assign(combine_s=(means["combine_s"] - means["idle_s"]).clip(lower=0))
    means["wait for weights_s"] = 0.0
    return means[[f"{part}_s" for part in PARTS]].reset_index()
