"""Throughput and time to first token of policies on every data set: what scheduling alone gains on real text."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.figures.kit.bars import grouped_bars
from analysis.figures.kit.base import SIMULATED_TEXTS, FigureData, Source
from analysis.figures.kit.policies import policies_only
from analysis.present.layout import PAGE_IN, axis_label, entries_of, new_figure, set_caption, set_legend
from analysis.present.panel import THROUGHPUT, TTFT

NAME = "dataset_policies"
SOURCE = Source("dataset_policies", minutes=4, simulated=SIMULATED_TEXTS)
_AXIS = "dataset"
_PANELS = (THROUGHPUT, TTFT)


def missing(data: FigureData) -> str | None:
    """Say that several policies on several data sets are needed."""
    if _AXIS not in data.axes or data.summary[_AXIS].nunique() < 2:
        return f"needs several data sets: {SOURCE.command}"
    if not set(data.axes) <= {_AXIS, "model"}:
        return f"needs a sweep over dataset and model only; this one has {', '.join(data.axes)}"
    if policies_only(data).summary["system"].nunique() < 2:
        return f"needs several policies: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return medians and intervals per data set, model and policy."""
    columns = [f"{panel.column}{end}" for panel in _PANELS for end in ("", "_low", "_high")]
    frame = policies_only(data).summary
    models = frame["model"] if "model" in data.axes else frame["model_name"]
    return frame[[_AXIS, "system", *columns]].assign(model=models)


def plot(data: FigureData) -> Figure:
    """Draw per model a panel per metric with a group of bars per data set."""
    numbers, frame = table(data), policies_only(data).summary
    models, datasets = (list(dict.fromkeys(numbers[key])) for key in ("model", _AXIS))
    figure = new_figure(PAGE_IN, 0.9 + 1.9 * len(models))
    panels = figure.subplots(len(models), len(_PANELS), squeeze=False)
    for row, model in zip(panels, models, strict=True):
        of_model = frame[numbers["model"] == model]
        for axes, panel in zip(row, _PANELS, strict=True):
            grouped_bars(axes, of_model, _AXIS, datasets, panel.column, panel.scale)
            axes.set_xticks(range(len(datasets)), datasets)
            axes.set_ylabel(axis_label(panel.label))
            axes.set_ylim(bottom=0)
            if len(models) > 1:
                axes.set_title(str(model), loc="left")
    set_legend(figure, entries_of(panels[0, 0]))
    set_caption(figure, data.caption)
    return figure
