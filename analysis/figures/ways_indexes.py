"""Huang et al.: many ways in a few layers, or few ways in many? Tokens per second against what the host takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analysis.data.load import Run
from analysis.data.paper_values import load_published
from analysis.data.stats import median_interval
from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.lines import decimal_log
from analysis.present.layout import COLUMN_IN, entries_of, new_figure, set_caption, set_legend

NAME = "ways_indexes"
SOURCE = Source("ways_sweep", minutes=None, simulated="experiment=ways_sweep")
_POLICY = "cpu_gpu_lru"
_MARKERS = "osD^vPX*"


def missing(data: FigureData) -> str | None:
    """Say that caches of several shapes are needed, beside several hosts, and a decode phase."""
    frame = table(data)
    if frame["shape"].nunique() < 2 or frame["host_s"].nunique() < 2:
        return f"needs a decode phase of {_POLICY} with several num_slots, indexes and hosts: {SOURCE.command}"
    if frame.duplicated(["host_s", "shape"]).any():
        return f"needs runs that differ in their hosts alone: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return tokens per second of one sequence, by what an expert takes on the host and the cache's ways x indexes."""
    rows = [
        {"host_s": run.manifest["model"]["expert_bytes"] / run.config["hardware"]["host_weights_bytes_per_s"]}
        | {"shape": shape}
        | _tokens_per_s(run, system)
        for run in data.runs
        if (run.config.get("hardware") or {}).get("host_weights_bytes_per_s")
        for system, shape in _shapes(run).items()
    ]
    frame = pd.DataFrame(rows, columns=["host_s", "shape", "tokens_per_s", "low", "high"])
    return frame.sort_values(["shape", "host_s"], ignore_index=True)


def plot(data: FigureData) -> Figure:
    """Draw a line per shape; open markers are published, at the times that the authors give for their threads."""
    frame = table(data)
    figure = new_figure(COLUMN_IN, 3.1)
    axes = figure.subplots()
    for marker, (shape, rows) in zip(_MARKERS, frame.groupby("shape", sort=False), strict=False):
        ends = [rows["tokens_per_s"] - rows["low"], rows["high"] - rows["tokens_per_s"]]
        axes.errorbar(
            rows["host_s"] * 1e3, rows["tokens_per_s"], yerr=ends, marker=marker, markersize=4, linewidth=1.1,
            capsize=1.5, label=shape,
        )  # fmt: skip
    threads = _published(axes)
    axes.set_xscale("log")
    decimal_log(axes)
    axes.set_xticks(1e3 * threads, [str(int(number)) for number in threads.index])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Threads of the host, at their published times")
    axes.set_ylabel("Tokens per second")
    set_legend(figure, entries_of(axes))
    note = "Open markers: Huang et al. (arXiv 2512.16473), Mixtral-8x7B, their routing."
    set_caption(figure, f"{data.caption} {note}")
    return figure


def _shapes(run: Run) -> dict[str, str]:
    """Return the systems with a cache of so many ways and indexes, told as such."""
    if run.decode is None:
        return {}
    layers = run.manifest["model"]["num_moe_layers"]
    options = {name: kind["options"] for name, kind in run.systems.items() if kind["policy"] == _POLICY}
    return {
        name: _shape(own["num_slots"], layers if own.get("indexes") is None else own["indexes"])
        for name, own in options.items()
        if own.get("num_slots") is not None
    }


def _shape(ways: int, indexes: int) -> str:
    return f"{ways} ways x {indexes} layers"


def _tokens_per_s(run: Run, system: str) -> dict[str, Any]:
    assert run.decode is not None
    found = asdict(median_interval(1 / run.decode.loc[run.decode["system"] == system, "tpot_s"]))
    return {"tokens_per_s": found["median"], "low": found["low"], "high": found["high"]}


def _published(axes: Axes) -> pd.Series[float]:
    """Draw the published rates; return the published seconds of an expert on the host by threads."""
    times, rates = load_published("huang_expert_s"), load_published("huang_ways")
    mixtral = times["hub_name"].str.startswith("mistralai/Mixtral") & (times["place"] == "host")
    seconds: pd.Series[float] = times[mixtral].set_index("threads")["seconds"]
    for marker, row in zip(_MARKERS, rates.to_dict("records"), strict=False):
        axes.plot(
            1e3 * seconds[row["threads"]], row["tokens_per_s"], marker, markersize=7, markerfacecolor="none",
            markeredgecolor="black", linestyle="none", label=f"Published: {_shape(row['ways'], row['indexes'])}",
        )  # fmt: skip
    return seconds
