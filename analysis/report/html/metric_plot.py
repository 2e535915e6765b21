"""Interactive plots of a metric: a bar per system, or bars or lines over the values of an option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from plotly import graph_objects as go

from analysis.present.panel import RATIO_TO_BEST_BASELINE, RATIO_TO_NO_SKEW, THROUGHPUT, Panel, panel
from analysis.present.style import label
from analysis.present.table import has_no_skew
from analysis.report.html.plotly_style import (
    INK,
    FigureJson,
    PlotLook,
    bar_marker,
    base_layout,
    figure_json,
    line_marker,
    plot_label,
    plot_text,
    whiskers,
    wrapped,
)
from analysis.report.html.section import axis_name, value_text

#: More values of a numeric option than these are drawn as lines, fewer as groups of bars.
_BARS = 4
#: An axis whose values span this factor is logarithmic.
_LOG_SPAN = 16
#: A bound's line across a group of bars reaches so far to both sides of the group's middle.
_HALF_GROUP = 0.42


@dataclass(frozen=True)
class Shown:
    """A metric that the page plots.

    Attributes:
        panel: what is drawn.
        unit: beside the title and on the axis.
        tick: Plotly's format of ticks.
        hover: Plotly's format of values.
        remark: after the direction in which it is better.
    """

    panel: Panel
    unit: str
    tick: str
    hover: str
    remark: str = ""

    @property
    def column(self) -> str:
        """The summary's column."""
        return self.panel.column

    @property
    def note(self) -> str:
        """What stands below the plot."""
        return f"{self.panel.better.capitalize()} is better{self.remark}"

    @property
    def is_ratio(self) -> bool:
        """Whether 1 is where the system is that all are compared with."""
        return self.panel in (RATIO_TO_BEST_BASELINE, RATIO_TO_NO_SKEW)


def shown_metrics(frame: pd.DataFrame) -> list[Shown]:
    """Choose what a summary allows to plot; times are in milliseconds where all are below a second."""
    ttft = panel("ttft_s", "ms" if frame["ttft_s"].max() < 1 else "s")
    shown = [
        Shown(panel("throughput_tokens_per_s"), "tokens/s", "~s", ",.0f"),
        Shown(ttft, ttft.unit, "~r", ",.4~r"),
        Shown(panel("idle_share"), "of their time", ".0%", ".1%", ": ranks that wait for the slowest"),
    ]
    ratio = RATIO_TO_BEST_BASELINE
    if ratio.column in frame and frame[ratio.column].notna().any():
        shown.insert(1, Shown(ratio, "ratio", "~r", ".3f", "; paired by round, the best exact baseline is 1"))
    if has_no_skew(frame):
        remark = "; paired by round, the best exact system at no skew is 1"
        shown.insert(1, Shown(RATIO_TO_NO_SKEW, "ratio", "~r", ".3f", remark))
    return shown


def by_system(frame: pd.DataFrame, styles: Mapping[str, PlotLook], shown: Shown) -> FigureJson:
    """Draw one bar per system, from the top."""
    traces = []
    for row in frame[frame[shown.column].notna()].to_dict("records"):
        name = str(row["system"])
        middle, low, high = (float(row[f"{shown.column}{end}"]) * shown.panel.scale for end in ("", "_low", "_high"))
        traces.append(
            go.Bar(
                orientation="h",
                name=plot_label(name),
                meta={"system": name},
                x=[middle],
                y=[wrapped(label(name))],
                error_x=whiskers([middle], [low], [high]),
                marker=bar_marker(styles[name], exact=row["exact"], bound=row["bound"]),
                customdata=[[low, high]],
                hovertemplate=_hover(shown, "x", ""),
                showlegend=True,
            )
        )
    layout = base_layout(bargap=0.25, barmode="overlay", shapes=_reference_line(shown, "x"))
    layout.xaxis.update(title={"text": shown.unit}, tickformat=shown.tick, rangemode="tozero")
    layout.yaxis.update(autorange="reversed", showgrid=False, ticks="")
    return figure_json(traces, layout)


def over_option(
    frame: pd.DataFrame, value_of_run: Mapping[str, Any], styles: Mapping[str, PlotLook], shown: Shown, axis: str
) -> FigureJson:
    """Draw a metric over the values of an option: lines for many numbers, else groups of bars.

    Args:
        frame: the section's summary.
        value_of_run: the option's value by id of the runs that are drawn.
        styles: by system.
        shown: the metric.
        axis: the option.
    """
    rows = frame[frame["run_id"].isin(value_of_run)]
    valued = rows.assign(_value=[value_of_run[run_id] for run_id in rows["run_id"]])
    values = list(dict.fromkeys(value_of_run.values()))
    values = sorted(values) if _is_numeric(values) else values
    draw = _lines if _is_numeric(values) and len(values) > _BARS else _bars
    return draw(valued, styles, shown, values, axis)


def _bars(
    frame: pd.DataFrame, styles: Mapping[str, PlotLook], shown: Shown, values: Sequence[Any], axis: str
) -> FigureJson:
    """Group bars by value; bounds are lines across the group."""
    position = {_plain(value): i for i, value in enumerate(values)}
    traces = []
    for name, rows, bound in _systems(frame, shown):
        positions = [position[_plain(value)] for value in rows["_value"]]
        draw = _bound_trace if bound else _bar_trace
        traces.append(draw(name, rows, positions, styles[name], shown, axis))
    layout = base_layout(barmode="group", bargap=0.16, shapes=_reference_line(shown, "y"))
    layout.xaxis.update(
        title={"text": axis_name(axis)},
        tickmode="array",
        tickvals=list(range(len(values))),
        ticktext=[plot_text(value_text(value)) for value in values],
        range=[-0.5, len(values) - 0.5],
        showgrid=False,
    )
    layout.yaxis.update(title={"text": shown.unit}, tickformat=shown.tick, rangemode="tozero")
    return figure_json(traces, layout)


def _bar_trace(
    name: str, rows: pd.DataFrame, positions: Sequence[int], style: PlotLook, shown: Shown, axis: str
) -> go.Bar:
    middle, low, high = _columns(rows, shown)
    return go.Bar(
        name=plot_label(name),
        meta={"system": name},
        x=positions,
        y=middle,
        customdata=list(zip(low, high, _points(rows, axis), strict=True)),
        error_y=whiskers(middle, low, high),
        marker=bar_marker(style, exact=bool(rows["exact"].iloc[0]), bound=False),
        hovertemplate=_hover(shown, "y", "%{customdata[2]}<br>"),
    )


def _bound_trace(
    name: str, rows: pd.DataFrame, positions: Sequence[int], style: PlotLook, shown: Shown, axis: str
) -> go.Scatter:
    """A line of three points, which can be hovered, and a gap per group."""
    middle, low, high = _columns(rows, shown)
    return go.Scatter(
        mode="lines",
        name=plot_label(name),
        meta={"system": name},
        x=[x for i in positions for x in (i - _HALF_GROUP, i, i + _HALF_GROUP, None)],
        y=[y for value in middle for y in (value, value, value, None)],
        customdata=[texts for texts in zip(low, high, _points(rows, axis), strict=True) for _ in range(4)],
        line={"color": style.colour, "dash": "dash", "width": 1.6},
        hovertemplate=_hover(shown, "y", "%{customdata[2]}<br>"),
    )


def _lines(
    frame: pd.DataFrame, styles: Mapping[str, PlotLook], shown: Shown, values: Sequence[Any], axis: str
) -> FigureJson:
    """Draw a line per system over a numeric option."""
    traces = []
    for name, rows, bound in _systems(frame, shown):
        ordered, style = rows.sort_values("_value"), styles[name]
        middle, low, high = _columns(ordered, shown)
        traces.append(
            go.Scatter(
                mode="lines+markers",
                name=plot_label(name),
                meta={"system": name},
                x=[_plain(value) for value in ordered["_value"]],
                y=middle,
                customdata=list(zip(low, high, _points(ordered, axis), strict=True)),
                error_y=whiskers(middle, low, high, style.colour),
                line={"color": style.colour, "dash": "dash" if bound else style.dash, "width": 1.8},
                marker=line_marker(style, exact=bool(rows["exact"].iloc[0])),
                hovertemplate=_hover(shown, "y", "%{customdata[2]}<br>"),
            )
        )
    layout = base_layout(shapes=_reference_line(shown, "y"))
    layout.xaxis.update(
        title={"text": axis_name(axis)},
        tickmode="array",
        tickvals=list(values),
        ticktext=[value_text(value) for value in values],
    )
    if _spans(values):
        layout.xaxis.type = "log"
    layout.yaxis.update(title={"text": shown.unit}, tickformat=shown.tick, rangemode="tozero")
    if shown.column == THROUGHPUT.column and _spans(frame[shown.column].dropna().tolist()):
        layout.yaxis.update(type="log", dtick=1)
    return figure_json(traces, layout)


def _systems(frame: pd.DataFrame, shown: Shown) -> list[tuple[str, pd.DataFrame, bool]]:
    """Return the systems with their rows and whether they are bounds, bounds last."""
    found = [
        (str(name), rows, bool(rows["bound"].iloc[0]))
        for name, rows in frame[frame[shown.column].notna()].groupby("system", sort=False)
    ]
    return sorted(found, key=lambda entry: entry[2])


def _columns(rows: pd.DataFrame, shown: Shown) -> tuple[list[float], list[float], list[float]]:
    """Return medians, lower and upper ends of the intervals, scaled as they are drawn."""
    middle, low, high = (
        (rows[f"{shown.column}{end}"] * shown.panel.scale).astype(float).tolist() for end in ("", "_low", "_high")
    )
    return middle, low, high


def _points(rows: pd.DataFrame, axis: str) -> list[str]:
    return [f"{axis_name(axis)} {value_text(value)}" for value in rows["_value"]]


def _hover(shown: Shown, axis: str, point: str) -> str:
    """Return Plotly's template of what is said of a bar or a marker: its system, point, value and interval."""
    value, low, high = (f"%{{{name}:{shown.hover}}}" for name in (axis, "customdata[0]", "customdata[1]"))
    unit = f" {shown.unit}" if shown.panel.unit else ""
    return f"<b>%{{fullData.name}}</b><br>{point}{value}{unit} [{low}, {high}]<extra></extra>"


def _reference_line(shown: Shown, direction: str) -> list[go.layout.Shape]:
    """Return a line where what ratios are to is, if they are drawn; it crosses the axis ``direction`` at 1."""
    if not shown.is_ratio:
        return []
    look = {"type": "line", "line": {"color": INK, "width": 1, "dash": "dot"}, "layer": "above"}
    if direction == "x":
        return [go.layout.Shape(x0=1, x1=1, y0=0, y1=1, yref="paper", **look)]
    return [go.layout.Shape(y0=1, y1=1, x0=0, x1=1, xref="paper", **look)]


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _spans(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _LOG_SPAN


def _plain(value: Any) -> Any:
    """Return a value that can be a key and JSON."""
    return value if isinstance(value, int | float | str | bool) else str(value)
