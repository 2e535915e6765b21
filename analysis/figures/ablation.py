"""What every part of HarMoEny is worth: throughput of variants that lack one to that of all of them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from analysis.data.load import Run
from analysis.data.pairing import run_ratio
from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import PAGE_IN, new_figure, set_caption
from analysis.present.style import label
from analysis.present.table import without_whiskers

NAME = "ablation"
SOURCE = Source("harmoeny_ablation", minutes=None, simulated="experiment=harmoeny_ablation")
_WHOLE, _LACKING = "harmoeny", "harmoeny_without_"
_THROUGHPUT = "throughput_tokens_per_s"
#: Ratios further from 1 have the same colour.
_FURTHEST = 1.6


def missing(data: FigureData) -> str | None:
    """Say that variants without one part, and the whole, are needed."""
    systems = set(data.summary["system"])
    if _WHOLE not in systems or not _variants(data):
        return f"needs {_WHOLE} and systems named {_LACKING}...: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return every variant's throughput to the whole's at every point, paired by round, with 95 % intervals."""
    points = data.summary.drop_duplicates("run_id").set_index("run_id")[data.axes].to_dict("index")
    rows = []
    for run in data.runs:
        whole = _by_round(run, _WHOLE)
        for system in _variants(data):
            if whole.empty or (own := _by_round(run, system)).empty:
                continue
            ratio = run_ratio(run, own, whole)
            rows.append(
                points[run.manifest["run_id"]]
                | {"system": system, "ratio": ratio.median, "low": ratio.low, "high": ratio.high}
            )
    return pd.DataFrame(rows, columns=[*data.axes, "system", "ratio", "low", "high"])


def plot(data: FigureData) -> Figure:
    """Draw a row per variant and a column per point."""
    frame = table(data)
    columns = [tuple(point) for point in frame[data.axes].drop_duplicates().itertuples(index=False)]
    values = np.full((len(_variants(data)), len(columns)), np.nan)
    for row in frame.to_dict("records"):
        values[_variants(data).index(row["system"]), columns.index(tuple(row[axis] for axis in data.axes))] = row[
            "ratio"
        ]
    figure = new_figure(PAGE_IN, 1.7 + 0.2 * len(values))
    axes = figure.subplots()
    axes.imshow(values, aspect="auto", norm=LogNorm(1 / _FURTHEST, _FURTHEST, clip=True), cmap="PuOr")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_yticks(range(len(values)), [label(system).partition(", ")[2] for system in _variants(data)])
    axes.set_xticks(range(len(columns)), [", ".join(map(_text, point)) for point in columns], rotation=90)
    axes.set_title("Throughput without one part of HarMoEny, to that with all of them", loc="left")
    set_caption(figure, without_whiskers(data.caption, data.summary))
    return figure


def _variants(data: FigureData) -> list[str]:
    return [name for name in dict.fromkeys(data.summary["system"]) if str(name).startswith(_LACKING)]


def _by_round(run: Run, system: str) -> pd.Series[float]:
    values = run.values
    return values[values["system"] == system].set_index("round")[_THROUGHPUT].sort_index()


def _text(value: object) -> str:
    return str(value).replace("_", " ")
