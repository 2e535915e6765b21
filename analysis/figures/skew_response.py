"""How much faster than Static EP the systems are, by the Gini index of a batch's routing, beside what was published."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.data.paper_values import CITATION, load_published, on_papers_machine
from analysis.data.stats import paired_ratio
from analysis.data.summary import known
from analysis.figures.kit import iterations
from analysis.figures.kit.base import FigureData
from analysis.figures.kit.lines import published_points, system_line
from analysis.present.layout import COLUMN_IN, entries_of, new_figure, set_caption, set_legend

NAME = "skew_response"
SOURCE = iterations.SOURCE
_METRIC = "throughput_tokens_per_s"
_REFERENCE = "static_ep"
_RATIO = "throughput_relative"


def missing(data: FigureData) -> str | None:
    """Say that one run with changing routing is needed, and Static EP and another system in it."""
    wanted = iterations.missing_change(data)
    if wanted is None and _REFERENCE not in data.runs[0].systems:
        return f"needs {_REFERENCE} among the systems: {SOURCE.command}"
    if wanted is None and data.summary["system"].nunique() < 2:
        return f"needs another system beside {_REFERENCE}: {SOURCE.command}"
    return wanted


def table(data: FigureData) -> pd.DataFrame:
    """Return throughput over Static EP's in the same batch by system and range of the Gini index, and published ones.

    Ours are medians over the range's batches with intervals, published ones ratios of throughput over all of them.
    """
    frame = iterations.round_table(data, _METRIC).pivot_table(index=["gini", "round"], columns="system", values=_METRIC)
    edges = np.linspace(0, 1, 5)
    published = _published(data)
    rows = []
    for low, high in pairwise(edges):
        gini = frame.index.get_level_values("gini")
        part = frame[(gini >= low) & (gini < high)]
        for system in data.runs[0].systems if len(part) else ():
            if system == _REFERENCE:
                continue
            ratio = paired_ratio(part[system], part[_REFERENCE])
            rows.append(
                {
                    "system": system, "gini_low": low, "gini_high": high, "num_batches": ratio.n, _RATIO: ratio.median,
                    f"{_RATIO}_low": ratio.low, f"{_RATIO}_high": ratio.high,
                }
            )  # fmt: skip
    ours = pd.DataFrame(rows)
    return ours if published.empty else ours.merge(published, on=["system", "gini_low", "gini_high"], how="left")


def plot(data: FigureData) -> Figure:
    """Draw a line per system over the ranges."""
    frame, run = table(data), data.runs[0]
    frame = frame.assign(gini=(frame["gini_low"] + frame["gini_high"]) / 2)
    figure = new_figure(COLUMN_IN, 3.1)
    axes = figure.subplots()
    for system in sorted(dict.fromkeys(frame["system"]), key=lambda name: bool(run.systems[name]["bound"])):
        rows = frame[frame["system"] == system]
        ends = (rows[f"{_RATIO}_low"], rows[f"{_RATIO}_high"])
        kind = run.systems[system]
        system_line(
            axes, system, rows["gini"], rows[_RATIO], exact=kind["exact"], bound=kind["bound"],
            knows=known(run, system), ends=ends,
        )  # fmt: skip
    axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
    caption = f"{data.caption} By ranges of the Gini index, each a quarter wide."
    column = f"published_{_RATIO}"
    if column in frame:
        published_points(axes, frame.dropna(subset=column), "gini", column, 1.0)
        caption += f" Open markers: published, {CITATION}, to their static placement; their batches' sizes are unknown."
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, 1)
    axes.set_xlabel("Gini index of the experts' tokens")
    axes.set_ylabel("Throughput / Static EP's")
    set_legend(figure, entries_of(axes))
    set_caption(figure, caption)
    return figure


def _published(data: FigureData) -> pd.DataFrame:
    """Return the published ratios where they are to be drawn; absolute values would need the batches' sizes."""
    if data.published is False or (data.published is None and not on_papers_machine(data.runs[0])):
        return pd.DataFrame()
    found = load_published("timeline")
    reference = found[found["system"] == _REFERENCE].set_index("gini_low")[_METRIC]
    ratio = found[_METRIC] / found["gini_low"].map(reference)
    return found[["system", "gini_low", "gini_high"]].assign(**{f"published_{_RATIO}": ratio})
