"""Throughput, time to first token and imbalance per layer on every data set: the paper's figures on real data."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from analysis.data.load import Run
from analysis.data.paper_values import router_is
from analysis.data.stats import median_interval
from analysis.figures.kit.bars import Comparison, compare, grouped_bars, limit_height
from analysis.figures.kit.base import SIMULATED_TEXTS, FigureData, Source
from analysis.present.layout import PAGE_IN, entries_of, new_figure, panel_title, set_caption, set_legend
from analysis.present.panel import IMBALANCE
from analysis.present.style import look

NAME = "dataset_sweep"
SOURCE = Source("dataset_sweep", minutes=9, simulated=SIMULATED_TEXTS)
_AXIS = "dataset"
#: What names the data set where its recorded routing is replayed.
_RECORDED = "router.case"
#: Inches for a model's two rows of panels.
_MODEL_HEIGHT = 4.6


def missing(data: FigureData) -> str | None:
    """Say that a sweep over data sets is needed, unless there is one."""
    axis = _axis(data)
    if axis not in data.axes or data.summary[axis].nunique() < 2:
        return f"needs several data sets: {SOURCE.command}"
    if not set(data.axes) <= {axis, "model"}:
        return f"needs a sweep over dataset and model only; this one has {', '.join(data.axes)}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per data set, model, system and, for the imbalance, MoE layer."""
    keys = [_AXIS, "model", "system"]
    rows: list[dict[Any, Any]] = []
    for comparison in _compare(data):
        published = comparison.published.set_index([_AXIS, "system"])
        for panel in comparison.panels:
            beside = published.get(panel.column, pd.Series(dtype=float))
            rows += [
                {**{key: row[key] for key in keys}, "metric": panel.column, "layer": None, "value": row[panel.column],
                 "low": row[f"{panel.column}_low"], "high": row[f"{panel.column}_high"],
                 "published": beside.get((row[_AXIS], row["system"]))}
                for row in comparison.frame.to_dict("records")
            ]  # fmt: skip
    points = _named(data)[[_AXIS, "model", "run_id"]].drop_duplicates().set_index("run_id")
    rows += [
        {_AXIS: points.loc[run.manifest["run_id"], _AXIS], "model": points.loc[run.manifest["run_id"], "model"],
         "metric": "imbalance", **row}
        for run in data.runs
        for row in layer_imbalance(run).to_dict("records")
    ]  # fmt: skip
    return pd.DataFrame(rows)


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
    numbers, comparisons = table(data), _compare(data)
    datasets = list(dict.fromkeys(_named(data)[_AXIS]))
    figure = new_figure(PAGE_IN, 0.6 + _MODEL_HEIGHT * len(comparisons))
    rows = figure.subfigures(2 * len(comparisons), 1, squeeze=False)[:, 0]
    with_bars: list[Axes] = []
    for i, comparison in enumerate(comparisons):
        model = str(comparison.frame["model"].iloc[0])
        with_bars += _bars(rows[2 * i], comparison, model, datasets)
        imbalance = numbers[(numbers["model"] == model) & (numbers["metric"] == IMBALANCE.column)]
        _layers(rows[2 * i + 1], imbalance, model, datasets)
    set_legend(figure, entries_of(*with_bars))
    notes = dict.fromkeys(comparison.caption for comparison in comparisons if comparison.caption)
    set_caption(figure, " ".join([data.caption, *notes]))
    return figure


def _bars(row: SubFigure, comparison: Comparison, model: str, datasets: list[str]) -> list[Axes]:
    """Draw a model's panels with bars by data set and return them."""
    panels = list(row.subplots(1, len(comparison.panels)))
    for axes, panel in zip(panels, comparison.panels, strict=True):
        grouped_bars(axes, comparison.frame, _AXIS, datasets, panel.column, panel.scale, comparison.published)
        axes.set_xticks(range(len(datasets)), datasets)
        axes.set_title(panel_title(f"{model}: {panel.title}", len(panels)), loc="left")
        limit_height(axes)
    return panels


def _layers(row: SubFigure, numbers: pd.DataFrame, model: str, datasets: list[str]) -> None:
    """Draw a model's imbalance by layer, a panel per data set."""
    panels = row.subplots(1, len(datasets), sharey=True, squeeze=False)[0]
    for axes, dataset in zip(panels, datasets, strict=True):
        _lines(axes, numbers[numbers[_AXIS] == dataset])
        axes.set_title(f"{model}, {dataset}", loc="left")
        axes.set_xlabel("MoE layer")
    panels[0].set_ylabel(IMBALANCE.label)
    panels[0].set_ylim(bottom=0.98)


def _lines(axes: Axes, rows: pd.DataFrame) -> None:
    for system in dict.fromkeys(rows["system"]):
        line = rows[rows["system"] == system].sort_values("layer")
        style = look(system)
        axes.plot(line["layer"], line["value"], color=style.colour, marker=style.marker, markersize=3, linewidth=1)
    axes.set_xticks(sorted(rows["layer"].unique())[:: 1 + rows["layer"].nunique() // 12])


def _compare(data: FigureData) -> list[Comparison]:
    """Return what is drawn of every model."""
    return [
        compare(data, rows, _AXIS, "datasets", _routed, at=None)
        for _, rows in _named(data).groupby("model", sort=False)
    ]


def _routed(run: Run) -> bool:
    return router_is(run, "ModelRouter") or router_is(run, "TraceRouter")


def _axis(data: FigureData) -> str:
    return _RECORDED if _RECORDED in data.axes else _AXIS


def _named(data: FigureData) -> pd.DataFrame:
    """Name data set and model of every row, where the sweep doesn't."""
    frame = data.summary.assign(**{_AXIS: data.summary[_axis(data)]})
    return frame if "model" in data.axes else frame.assign(model=frame["model_name"])
