"""How popular the experts are on every data set, from the most to the least popular one."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.data.routing import sorted_shares
from analysis.figures.kit.base import SIMULATED_TEXTS, FigureData, Source
from analysis.present.layout import COLUMN_IN, PAGE_IN, entries_of, new_figure, set_caption, set_legend
from analysis.present.style import dataset_look
from analysis.present.table import without_medians

NAME = "expert_popularity"
SOURCE = Source("dataset_sweep", minutes=9, simulated=SIMULATED_TEXTS)
#: Routers that decide by the text and do not make popularity up.
_ROUTERS = ("model", "trace")
#: From so many experts on both axes are logarithmic.
_MANY_EXPERTS = 32


def missing(data: FigureData) -> str | None:
    """Say that recorded routing is needed that depends on the text."""
    if {run.manifest["point"]["router"] for run in data.runs} - set(_ROUTERS):
        return f"needs a routing that depends on the text: {SOURCE.command}"
    if any(run.routing is None for run in data.runs):
        return f"needs routing.parquet, which earlier versions did not record; delete the runs and: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return shares of assignments by model, data set, stack and popularity: median, least, largest of the layers."""
    frames = []
    for run, (model, dataset) in zip(data.runs, _names(data), strict=True):
        assert run.routing is not None, "missing() asks for it"
        shares = sorted_shares(run.routing).groupby(["stack", "position"])["share"]
        values = shares.agg(share="median", share_low="min", share_high="max").reset_index()
        values.insert(0, "model", model)
        values.insert(1, "dataset", dataset)
        values["num_layers"] = values["stack"].map(run.routing.groupby("stack")["layer"].nunique())
        frames.append(values)
    return pd.concat(frames, ignore_index=True)


def plot(data: FigureData) -> Figure:
    """Draw a panel per model and stack, and in it a line per data set over a band of its layers."""
    frame = table(data)
    kinds = list(frame[["model", "stack"]].drop_duplicates().itertuples(index=False, name=None))
    columns = min(2, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = new_figure(COLUMN_IN if columns == 1 else PAGE_IN, 0.9 + 1.9 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, (model, stack) in zip(panels.flat, kinds, strict=False):
        rows_here = frame[(frame["model"] == model) & (frame["stack"] == stack)]
        _panel(axes, rows_here)
        stacks = frame.loc[frame["model"] == model, "stack"].nunique()
        name = f"{model}, {('encoder', 'decoder')[int(stack)]}" if stacks == 2 else str(model)
        num_layers = int(rows_here["num_layers"].iloc[0])
        axes.set_title(f"{name}: {num_layers} MoE layer{'s' if num_layers > 1 else ''}", loc="left")
    for axes in panels.flat[len(kinds) :]:
        axes.set_visible(False)
    entries = {name: handle for axes in panels.flat for name, handle in entries_of(axes).items()}
    set_legend(figure, entries)
    caption = without_medians(data.caption, data.summary)
    set_caption(figure, f"{caption} All rounds together; lines: median of the layers, bands: all layers.")
    return figure


def _panel(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw a line per data set: the median of the layers, over a band from the least to the largest of them."""
    num_experts = int(rows["position"].max())
    for dataset in dict.fromkeys(rows["dataset"]):
        line = rows[rows["dataset"] == dataset].sort_values("position")
        style = dataset_look(str(dataset))
        axes.plot(
            line["position"], 100 * line["share"], color=style.colour, marker=style.marker, markersize=3.5,
            linewidth=1.2, markevery=1 + num_experts // 16, label=str(dataset),
        )  # fmt: skip
        axes.fill_between(
            line["position"], 100 * line["share_low"], 100 * line["share_high"], color=style.colour, alpha=0.15,
            linewidth=0,
        )  # fmt: skip
    axes.axhline(100 / num_experts, color="#555555", linewidth=0.8, linestyle=":", label="all alike")
    axes.set_xlabel("Experts, the most popular first")
    axes.set_ylabel("Share of assignments (%)")
    if num_experts >= _MANY_EXPERTS:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ticks := [2**i for i in range(num_experts.bit_length())], [str(tick) for tick in ticks])
    else:
        axes.set_xticks(range(1, num_experts + 1, 1 + num_experts // 17))
        axes.set_ylim(bottom=0)


def _names(data: FigureData) -> list[tuple[str, str]]:
    """Name model and data set of every run; a recorded routing is that of its case."""
    names = []
    for run in data.runs:
        case = run.config["router"].get("case") if run.manifest["point"]["router"] == "trace" else None
        names.append((run.manifest["model"]["name"], case or run.manifest["dataset"]["name"]))
    return names
