"""EPS-MoE: how long a layer takes in so many stages of experts, against its tokens; with what its authors published."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analysis.data.load import Run
from analysis.data.paper_values import load_published
from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.lines import decimal_log
from analysis.present.layout import PAGE_IN, entries_of, new_figure, set_caption, set_legend

NAME = "expert_stages"
SOURCE = Source("stages_sweep", minutes=None, simulated="experiment=stages_sweep")
_TOKENS = "tokens_per_rank"
_MARKERS = "osD^vPX*"
_BY_MODEL = "by its cost model"


def missing(data: FigureData) -> str | None:
    """Say that EPS-MoE with one stage and with more is needed, at several numbers of tokens."""
    frame = table(data)
    if frame.empty or frame[_TOKENS].nunique() < 2 or not {"1", "2"} <= set(frame["stages"]):
        return f"needs eps_moe with num_stages 1, 2 and others at several numbers of tokens: {SOURCE.command}"
    if frame.duplicated([_TOKENS, "stages"]).any():
        return f"needs runs that differ in tokens alone: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return the median over rounds of the mean layer's time, max over ranks, by tokens per rank and stages."""
    rows: list[dict[str, Any]] = [
        {_TOKENS: int(run.config["batch_size"]) * int(run.config["seq_len"]), "stages": stages, "layer_s": seconds}
        for run in data.runs
        for stages, seconds in _layers(run).items()
    ]
    frame = pd.DataFrame(rows, columns=[_TOKENS, "stages", "layer_s"])
    one = frame[frame["stages"] == "1"].drop_duplicates(_TOKENS).set_index(_TOKENS)["layer_s"]
    frame["speedup"] = frame[_TOKENS].map(one) / frame["layer_s"]
    return frame.sort_values(_TOKENS, ignore_index=True)


def plot(data: FigureData) -> Figure:
    """Draw the layer's time, and how many times as fast as one stage so many are; open markers are published."""
    frame, published = table(data), load_published("eps_moe_layers")
    one = published[published["num_stages"] == 1].set_index("m")["layer_s"]
    published = published.assign(speedup=published["m"].map(one) / published["layer_s"])
    figure = new_figure(PAGE_IN, 3.2)
    time, speedup = figure.subplots(1, 2)
    for marker, (stages, rows) in zip(_MARKERS, frame.groupby("stages", sort=False), strict=False):
        told = f"N {_BY_MODEL}" if stages == _BY_MODEL else f"N = {stages}"
        width = 1.8 if stages == _BY_MODEL else 1.0
        for axes, column, scale in ((time, "layer_s", 1e3), (speedup, "speedup", 1.0)):
            axes.plot(rows[_TOKENS], rows[column] * scale, marker=marker, markersize=4, linewidth=width, label=told)
    for stages, marker in ((1, "o"), (2, "s")):
        _open(time, published[published["num_stages"] == stages], "layer_s", 1e3, marker, f"Published: N = {stages}")
    _open(speedup, published[published["num_stages"] == 2], "speedup", 1.0, "s", "Published: N = 2")
    decimal_log(time)
    time.set_ylabel("Layer (ms)")
    speedup.set_ylabel("Times as fast as N = 1")
    for axes in (time, speedup):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted(frame[_TOKENS].unique()), [f"{n:,}" for n in ticks], rotation=45, fontsize=7)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("Tokens per rank; published: m")
    set_legend(figure, entries_of(time))
    note = "Open markers: arXiv 2410.12247, DeepSeek-V2 on 8 H800; what its m counts is not known."
    set_caption(figure, f"{data.caption} {note}")
    return figure


def _layers(run: Run) -> dict[str, float]:
    """Return the layer's seconds by the number of stages, of all systems of EPS-MoE's policy."""
    found = {}
    for name, system in run.systems.items():
        if system["policy"] != "eps_moe":
            continue
        stages = system["options"].get("num_stages")
        rows = run.layers[run.layers["system"] == name]
        slowest = rows.groupby(["round", "layer"])["layer_s"].max()
        found[_BY_MODEL if stages is None else str(stages)] = float(slowest.groupby("round").mean().median())
    return found


def _open(axes: Axes, rows: pd.DataFrame, column: str, scale: float, marker: str, told: str) -> None:
    axes.plot(
        rows["m"], rows[column] * scale, marker, markersize=5, markerfacecolor="white", markeredgecolor="black",
        linestyle="none", label=told, zorder=4,
    )  # fmt: skip
