"""What the figures share that follow one run whose routing changes from batch to batch."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.data.routing import gini_by_round
from analysis.data.summary import known
from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.lines import system_line
from analysis.present.layout import COLUMN_IN, axis_label, entries_of, new_figure, set_caption, set_legend
from analysis.present.panel import Panel
from analysis.present.table import without_medians

SOURCE = Source(
    "changing_skew",
    minutes=2,
    simulated="experiment=changing_skew backend=simulator hardware=dgx1_v100 world_size=8 model=switch_base_128 "
    "model.random_weights=true batch_size=16 seq_len=1024",
)
#: The Gini index has to change by so much within a run before it is worth an axis.
_LEAST_CHANGE = 0.1


def missing_change(data: FigureData) -> str | None:
    """Say that one run with changing routing is needed."""
    wanted = f"needs one run in which the skew changes from batch to batch: {SOURCE.command}"
    if len(data.runs) != 1 or data.runs[0].routing is None:
        return wanted
    values = gini_by_round(data.runs[0].routing)
    return None if values.max() - values.min() >= _LEAST_CHANGE else wanted


def round_table(data: FigureData, metric: str) -> pd.DataFrame:
    """Return a metric by round and system, with the round's Gini index."""
    run = data.runs[0]
    assert run.routing is not None, "missing_change() asks for it"
    values = run.values[["round", "system", metric]]
    order = {name: i for i, name in enumerate(run.systems)}
    values = values.sort_values(["round", "system"], key=lambda column: column.replace(order), ignore_index=True)
    return values.assign(gini=values["round"].map(gini_by_round(run.routing)))


def plot_rounds(data: FigureData, frame: pd.DataFrame, panel: Panel) -> Figure:
    """Draw the Gini index over the rounds, and below it a line per system."""
    run = data.runs[0]
    figure = new_figure(COLUMN_IN, 3.9)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, 2.6]})
    _draw_gini(above, frame)
    rounds = frame["round"].nunique()
    systems = sorted(dict.fromkeys(frame["system"]), key=lambda name: bool(run.systems[name]["bound"]))
    for k, system in enumerate(systems):
        rows = frame[frame["system"] == system]
        step = 1 + rounds // 8  # the systems' markers stand at different batches, so that none hides another's
        system_line(
            below,
            system,
            rows["round"],
            rows[panel.column] * panel.scale,
            mark_every=(k % step, step),
            exact=run.systems[system]["exact"],
            bound=run.systems[system]["bound"],
            knows=known(run, system),
        )
    below.set_ylabel(axis_label(panel.label))
    below.set_xlabel("Batch")
    set_legend(figure, entries_of(below))
    set_caption(figure, without_medians(data.caption, data.summary))
    return figure


def _draw_gini(axes: Axes, frame: pd.DataFrame) -> None:
    """Draw the Gini index of the experts' popularity as steps, one per batch."""
    values = frame.drop_duplicates("round")
    axes.fill_between(values["round"], values["gini"], step="mid", color="#cccccc", linewidth=0)
    axes.step(values["round"], values["gini"], where="mid", color="black", linewidth=1.0)
    axes.set_ylim(0, 1)
    axes.set_ylabel("Gini index\nof experts")
