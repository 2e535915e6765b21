"""How many tokens every rank executes in every layer, under every system: the paper's load of the GPUs."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.data.load import Run
from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import COLUMN_IN, PAGE_IN, new_figure, panel_title, set_caption
from analysis.present.style import label, look
from analysis.present.table import without_letters, without_medians

NAME = "load_balance"
SOURCE = Source("skew_sweep", minutes=5, simulated="experiment=paper_skew")
_MOST_COLUMNS = 4


def missing(data: FigureData) -> str | None:
    """Say that one run on several ranks is needed."""
    if len(data.runs) != 1:
        return f"needs one run; name the folder of one that a sweep made: {SOURCE.command}"
    if data.runs[0].manifest["world_size"] < 2:
        return f"needs several ranks: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return the tokens that every rank executed in every layer of one batch, the one with the most unequal routing.

    ``relative_load`` is their ratio to the mean of the ranks, ``imbalance`` the system's over all layers, median over
    all rounds.
    """
    run = data.runs[0]
    values = run.values
    medians = values.groupby("system")["imbalance"].median()
    summed = values.groupby("round")["imbalance"].sum()
    layers = run.layers[run.layers["round"] == summed.index[int(summed.to_numpy().argmax())]]
    mean = layers.groupby(["iteration", "layer"])["executed_tokens"].transform("mean")
    frame: pd.DataFrame = layers[["system", "round", "layer", "rank", "executed_tokens"]].assign(
        relative_load=(layers["executed_tokens"] / mean).fillna(1.0), imbalance=layers["system"].map(medians)
    )
    return frame


def plot(data: FigureData) -> Figure:
    """Draw a panel per system: by layer a bar per rank."""
    frame, run = table(data), data.runs[0]
    systems = [name for name in run.systems if name in set(frame["system"])]
    rows = -(-len(systems) // _MOST_COLUMNS)
    columns = -(-len(systems) // rows)
    figure = new_figure(COLUMN_IN if columns <= 2 else PAGE_IN, 0.95 + 1.15 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, axes in enumerate(panels.flat):
        if i >= len(systems):
            axes.set_visible(False)
            continue
        rows_of = frame[frame["system"] == systems[i]]
        _panel(axes, rows_of, systems[i])
        title = f"{label(systems[i])}: {rows_of['imbalance'].iloc[0]:.2f}"
        axes.set_title(panel_title(title, columns), loc="left", fontsize=7.5, pad=3)
        if i + columns >= len(systems):
            axes.set_xlabel("MoE layer, rank by rank")
            axes.xaxis.set_tick_params(labelbottom=True)
    panels[0, 0].set_ylim(0, float(frame["relative_load"].max()) * 1.04)
    figure.supylabel("Tokens of a rank /\nmean of the ranks", fontsize=8)
    caption = without_letters(without_medians(data.caption, data.summary), data.summary)
    set_caption(
        figure,
        f"{caption} Batch {frame['round'].iloc[0]}; numbers: imbalance over all "
        f"layers, median of all batches. Assignments per layer: {_sizes(run)}.",
    )
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, system: str) -> None:
    """Draw a system's load: in every layer a bar per rank, relative to the mean of the ranks."""
    num_ranks, layers = int(rows["rank"].max()) + 1, sorted(rows["layer"].unique())
    width, colour = 0.8 / num_ranks, look(system).colour
    positions = rows["layer"] + width * (rows["rank"] - (num_ranks - 1) / 2)
    axes.bar(positions, rows["relative_load"], width, color=colour, edgecolor="white", linewidth=0.25)
    axes.axhline(1.0, color="black", linewidth=0.7, linestyle=(0, (4, 2)))
    axes.set_xticks(layers[:: 1 + (len(layers) - 1) // 8])


def _sizes(run: Run) -> str:
    """Say how many assignments the layers have: few are not worth a fetch, and stay where they are."""
    first = run.layers[run.layers["iteration"] == run.layers["iteration"].iloc[0]]
    sizes = first.groupby("layer")["num_assignments"].sum()
    starts = sizes[sizes.diff() != 0]
    ends = [*(starts.index[1:] - 1), sizes.index[-1]]
    spans = (
        f"layer {start}" if start == end else f"layers {start}-{end}"
        for start, end in zip(starts.index, ends, strict=True)
    )
    return ", ".join(f"{size:,} ({span})" for size, span in zip(starts, spans, strict=True))
