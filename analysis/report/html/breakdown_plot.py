"""The interactive time breakdown: a stacked bar per system and rank, under the system's name."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from plotly import graph_objects as go

from analysis.data.breakdown import PARTS, breakdown
from analysis.data.load import Run
from analysis.report.html.plotly_style import FigureJson, base_layout, figure_json, phase_marker, plot_label


@dataclass(frozen=True)
class Bars:
    """The bars of a run from top to bottom.

    Attributes:
        frame: a row per bar: ``system``, ``whose`` (the rank, or ``mean``), ``key`` and per part ``<part>_s``.
        heads: by system, the key of the row with its name, above its bars.
    """

    frame: pd.DataFrame
    heads: dict[str, str]

    @property
    def rows(self) -> list[str]:
        """Keys of all rows from top to bottom: heads and bars."""
        return [
            key
            for system, head in self.heads.items()
            for key in [head, *self.frame.loc[self.frame["system"] == system, "key"]]
        ]


def bars_of(run: Run, systems: list[str], *, per_rank: bool) -> Bars:
    """Return the bars of a run.

    Args:
        run: the run.
        systems: names in the order in which they are shown; a key begins with the position in it.
        per_rank: a bar per rank; else the mean over ranks.
    """
    frame = breakdown(run.layers)
    if not per_rank:
        frame = frame.drop(columns="rank").groupby("system", sort=False).mean().reset_index()
    order = {system: i for i, system in enumerate(systems)}
    frame = frame.sort_values("system", key=lambda names: names.map(order), kind="stable")
    whose = [f"rank {rank}" for rank in frame["rank"]] if per_rank else ["mean"] * len(frame)
    keys = [f"{order[system]}/{name}" for system, name in zip(frame["system"], whose, strict=True)]
    return Bars(
        frame.assign(whose=whose, key=keys), {name: f"{order[name]}/" for name in dict.fromkeys(frame["system"])}
    )


def stacked(bars: Bars) -> FigureJson:
    """Draw a trace per part of a layer; the systems' names are annotations on rows of their own."""
    frame = bars.frame
    names = [plot_label(system) for system in frame["system"]]
    traces = [
        go.Bar(
            orientation="h",
            name=part,
            x=(frame[f"{part}_s"] * 1e3).tolist(),
            y=frame["key"].tolist(),
            customdata=[list(texts) for texts in zip(names, frame["whose"], frame["system"], strict=True)],
            marker=phase_marker(part),
            hovertemplate=f"<b>%{{customdata[0]}}</b>, %{{customdata[1]}}<br>{part}: %{{x:.3~r}} ms<extra></extra>",
        )
        for part in PARTS
    ]
    layout = base_layout(barmode="stack", bargap=0.12, annotations=[_head(bars, system) for system in bars.heads])
    layout.xaxis.update(title={"text": "ms per MoE layer"}, rangemode="tozero", side="bottom")
    rows, heads = bars.rows, set(bars.heads.values())
    layout.yaxis.update(
        type="category",
        categoryorder="array",
        categoryarray=rows,
        range=[len(rows) - 0.5, -0.6],
        tickmode="array",
        tickvals=rows,
        ticktext=["" if key in heads else key.split("/", 1)[1] for key in rows],
        showgrid=False,
        ticks="",
        fixedrange=True,
    )
    return figure_json(traces, layout)


def _head(bars: Bars, system: str) -> go.layout.Annotation:
    return go.layout.Annotation(
        name=system,
        text=f"<b>{plot_label(system)}</b>",
        x=0,
        xref="x",
        xanchor="left",
        y=bars.heads[system],
        yref="y",
        yanchor="middle",
        yshift=-2,
        showarrow=False,
    )
