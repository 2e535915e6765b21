"""Throughput, time to first token and imbalance per layer on every data set: the paper's figures on real data."""

from __future__ import annotations

from textwrap import fill

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.bars import bars_legend, grouped_bars
from analysis.figures.base import FigureData
from analysis.load import Run
from analysis.stats import median_interval
from analysis.style import look

NAME = "dataset_sweep"
_AXIS = "dataset"
_PANELS = (
    ("throughput_tokens_per_s", "Throughput (1,000 tokens/s), higher is better", 1e-3),
    ("ttft_s", "Time to first token (s), lower is better", 1.0),
)
_COLUMNS = tuple(f"{name}{end}" for name, *_ in _PANELS for end in ("", "_low", "_high"))


def missing(data: FigureData) -> str | None:
    """Say that a sweep over data sets is needed, unless there is one."""
    if _AXIS not in data.axes or data.summary[_AXIS].nunique() < 2:
        return "needs several data sets: python run.py experiment=dataset_sweep"
    if not set(data.axes) <= {_AXIS, "model"}:
        return f"needs a sweep over dataset and model only; this one has {', '.join(data.axes)}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per data set, model, system and, for the imbalance, MoE layer."""
    frame = _with_model(data)
    keys = [_AXIS, "model", "system"]
    whole = [
        {**{key: row[key] for key in keys}, "metric": name, "layer": None, "value": row[name],
         "low": row[f"{name}_low"], "high": row[f"{name}_high"]}
        for row in frame.to_dict("records")
        for name, *_ in _PANELS
    ]  # fmt: skip
    points = frame[[_AXIS, "model", "run_id"]].drop_duplicates().set_index("run_id")
    layers = [
        {_AXIS: points.loc[run.manifest["run_id"], _AXIS], "model": points.loc[run.manifest["run_id"], "model"],
         "metric": "imbalance", **row}
        for run in data.runs
        for row in layer_imbalance(run).to_dict("records")
    ]  # fmt: skip
    return pd.DataFrame([*whole, *layers])


def layer_imbalance(run: Run) -> pd.DataFrame:
    """Return the imbalance of every system in every MoE layer: median over rounds with its interval.

    Returns:
        Columns ``system``, ``layer``, ``value``, ``low``, ``high``.
    """
    loads = run.layers.groupby(["system", "iteration", "layer"], sort=False)["executed_tokens"].agg(["max", "mean"])
    imbalance = (loads["max"] / loads["mean"]).fillna(1.0)
    rows = []
    for (system, layer), samples in imbalance.groupby(["system", "layer"], sort=False):
        estimate = median_interval(samples)
        rows.append((system, layer, estimate.median, estimate.low, estimate.high))
    return pd.DataFrame(rows, columns=["system", "layer", "value", "low", "high"])


def plot(data: FigureData) -> Figure:
    """Draw per model a row of bars by data set and a row with the imbalance per layer on every data set."""
    frame = _with_model(data)
    numbers = table(data)
    models = list(dict.fromkeys(frame["model"]))
    datasets = list(dict.fromkeys(frame[_AXIS]))
    figure = Figure(figsize=(8.4, 5.2 * len(models)))
    rows = figure.subfigures(2 * len(models), 1, squeeze=False)[:, 0]
    height = figure.get_figheight()
    first: Axes | None = None
    for i, model in enumerate(models):
        of_model = frame[frame["model"] == model]
        panels = rows[2 * i].subplots(1, len(_PANELS))
        for axes, (column, title, scale) in zip(panels, _PANELS, strict=True):
            grouped_bars(axes, of_model, _AXIS, datasets, column, scale)
            axes.set_xticks(range(len(datasets)), datasets, fontsize=8)
            axes.set_title(f"{model}: {title}", fontsize=9, loc="left")
            axes.set_ylim(bottom=0)
        first = first or panels[0]
        layers = rows[2 * i + 1].subplots(1, len(datasets), sharey=True, squeeze=False)[0]
        for axes, dataset in zip(layers, datasets, strict=True):
            part = numbers[(numbers["model"] == model) & (numbers[_AXIS] == dataset)]
            _lines(axes, part[part["metric"] == "imbalance"])
            axes.set_title(f"{model}, {dataset}", fontsize=8, loc="left")
            axes.set_xlabel("MoE layer")
        layers[0].set_ylabel("Imbalance (max / mean)")
        layers[0].set_ylim(bottom=0.98)
        rows[2 * i].subplots_adjust(left=0.07, right=0.99, top=0.8, bottom=0.14, wspace=0.18)
        rows[2 * i + 1].subplots_adjust(left=0.07, right=0.99, top=0.88, bottom=0.3, wspace=0.08)
    assert first is not None, "there are models"
    bars_legend(figure, first)
    figure.text(0.01, 0.05 / height, fill(data.caption, 180), fontsize=6.5, color="#555555", va="bottom")
    return figure


def _lines(axes: Axes, rows: pd.DataFrame) -> None:
    for system in dict.fromkeys(rows["system"]):
        line = rows[rows["system"] == system].sort_values("layer")
        style = look(system)
        axes.plot(line["layer"], line["value"], color=style.colour, marker=style.marker, markersize=3, linewidth=1)
    axes.set_xticks(sorted(rows["layer"].unique())[:: 1 + rows["layer"].nunique() // 12])


def _with_model(data: FigureData) -> pd.DataFrame:
    """Name the model of every row, where the sweep doesn't."""
    frame = data.summary
    return frame if "model" in data.axes else frame.assign(model=frame["model_name"])
