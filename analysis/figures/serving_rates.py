"""Serving: goodput and tail latencies against the rate at which requests arrive."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.data.serving import limits_of
from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.lines import decimal_log, system_line
from analysis.present.layout import PAGE_IN, axis_label, entries_of, new_figure, set_caption, set_legend
from analysis.present.serving_table import RATE, limits_note, serving_frame, support_note, tail_of
from analysis.present.table import without_medians

NAME = "serving_rates"
SOURCE = Source("serving_rates", minutes=8, simulated="experiment=serving_h100")
_RATE = "rate_per_s"
_TITLES = {"ttft": "TTFT", "tpot": "Time per output token"}


def missing(data: FigureData) -> str | None:
    """Say that an open loop at several rates is needed."""
    frame = _frame(data)
    if frame.empty or frame[_RATE].nunique() < 2:
        return f"needs an open loop at several rates: {SOURCE.command}"
    if frame.duplicated([_RATE, "system"]).any():
        return "needs one run per rate; what differs between these besides the rate, is for several figures"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return throughput, goodput and percentiles by rate and system."""
    return _frame(data)


def plot(data: FigureData) -> Figure:
    """Draw goodput (throughput where nothing is limited), TTFT and, of several tokens, the time per token."""
    frame, limits = table(data), limits_of(data.runs[0])
    tail = tail_of(frame)
    tails = [name for name in _TITLES if f"{name}_p{tail}_s" in frame]
    figure = new_figure(PAGE_IN, 3.0)
    panels = figure.subplots(1, 1 + len(tails))
    good = "goodput_per_s" in frame
    _lines(panels[0], data, frame, "goodput_per_s" if good else "requests_per_s", 1.0)
    panels[0].set_ylabel(axis_label("Goodput (requests/s)" if good else "Throughput (requests/s)"))
    rates = sorted(frame[_RATE].unique())
    panels[0].plot(rates, rates, color="#555555", linewidth=0.8, linestyle=":", label="All that arrive")
    panels[0].set_ylim(bottom=0)
    for axes, name in zip(panels[1:], tails, strict=True):
        _lines(axes, data, frame, f"{name}_p{tail}_s", 1e3)
        if limit := limits.get(f"{name}_s"):
            axes.axhline(limit * 1e3, color="#555555", linewidth=0.8, linestyle="--", label="Limit")
        axes.set_ylabel(axis_label(f"{_TITLES[name]}, {tail}th percentile (ms)"))
        decimal_log(axes)
    for axes in panels:
        axes.set_xlabel("Arrivals (requests/s)")
    set_legend(figure, entries_of(*panels))
    set_caption(figure, _caption(data, frame))
    return figure


def _frame(data: FigureData) -> pd.DataFrame:
    """Return the rows of all runs; the rate is no axis of its own."""
    points = data.summary.drop_duplicates("run_id").set_index("run_id")[data.axes].to_dict("index")
    axes = [axis for axis in data.axes if axis != RATE]
    runs = [run for run in data.runs if run.manifest["run_id"] in points]
    return serving_frame(runs, [points[run.manifest["run_id"]] for run in runs], axes)


def _lines(axes: Axes, data: FigureData, frame: pd.DataFrame, column: str, scale: float) -> None:
    kinds = {str(kind["system"]): kind for kind in data.summary.to_dict("records")}
    for system, rows in frame.groupby("system", sort=False):
        kind, rows = kinds[str(system)], rows.sort_values(_RATE)
        middle, *ends = (rows[f"{column}{end}"] * scale for end in ("", "_low", "_high"))
        system_line(
            axes, str(system), rows[_RATE], middle, exact=kind["exact"], bound=kind["bound"],
            knows=kind.get("knows"), ends=(ends[0], ends[1]),
        )  # fmt: skip


def _caption(data: FigureData, frame: pd.DataFrame) -> str:
    fewest, rounds = frame["num_requests"].min(), frame["num_rounds"].max()
    parts = [
        without_medians(data.caption, data.summary),
        f"At least {fewest} requests per rate in {rounds} rounds; whiskers: 95 % intervals",
    ]
    notes = [limits_note(data.runs), support_note(frame).removesuffix(".")]
    return " ".join(f"{part.removesuffix('.')}." for part in [*parts, *notes] if part)
