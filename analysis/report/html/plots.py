"""The report's interactive plots of a section: metrics at every point, throughput round by round, time in a layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from plotly import graph_objects as go

from analysis.present.panel import THROUGHPUT
from analysis.report.html import breakdown_plot, yardstick_plot
from analysis.report.html.metric_plot import Shown, by_system, over_option, shown_metrics
from analysis.report.html.plotly_style import (
    FigureJson,
    PlotLook,
    base_layout,
    figure_json,
    line_marker,
    looks,
    plot_label,
)
from analysis.report.html.section import Section, point_label
from results_schema.yardstick import MOVED

#: With more bars than these the time breakdown shows means over ranks.
_MOST_BARS = 48
_HEIGHT, _ROW_HEIGHT, _BAR_ROW_HEIGHT = 300, 19, 30
#: Of so many rounds each has its number on the axis.
_MOST_ROUND_TICKS = 12


@dataclass(frozen=True)
class Plot:
    """An interactive plot.

    Attributes:
        key: its name in the page, unique in a section.
        title: above it.
        unit: of what is drawn.
        note: below it, before what it was measured on.
        variants: by name, for a choice of the reader; a single one has an empty name.
        height: in pixels, without the legend, by variant.
    """

    key: str
    title: str
    unit: str
    note: str
    variants: dict[str, FigureJson]
    height: dict[str, int] = field(default_factory=dict)


def plots_of(section: Section) -> list[Plot]:
    """Draw a section."""
    styles = looks(section.systems)
    drawn = [_metric_plot(section, styles, shown) for shown in shown_metrics(section.frame)]
    has_rounds = any(values["round"].nunique() > 1 for values in section.values)
    of_rounds = [_rounds(section, styles)] if has_rounds else []
    return [*drawn, *of_rounds, *_drift(section), _breakdown(section)]


def _metric_plot(section: Section, styles: dict[str, PlotLook], shown: Shown) -> Plot:
    """A metric by system, or against the swept option; a further option becomes a choice."""
    intervals = ". Whiskers: 95 % bootstrap intervals" if section.frame["num_rounds"].max() > 1 else ""
    note = shown.note + intervals
    if not section.axes:
        figure = by_system(section.frame, styles, shown)
        height = 70 + _BAR_ROW_HEIGHT * len(figure["data"])
        return Plot(shown.column, shown.panel.name, shown.unit, note, {"": figure}, {"": height})
    axis, *others = section.axes
    groups: dict[str, list[int]] = {}
    for i, point in enumerate(section.points):
        groups.setdefault(point_label(point, others), []).append(i)
    variants = {}
    for name, members in groups.items():
        values = {section.runs[i].manifest["run_id"]: section.points[i][axis] for i in members}
        variants[name] = over_option(section.frame, values, styles, shown, axis)
    return Plot(shown.column, shown.panel.name, shown.unit, note, variants, dict.fromkeys(variants, _HEIGHT))


def _rounds(section: Section, styles: dict[str, PlotLook]) -> Plot:
    """Throughput round by round: what the medians are made of."""
    variants = {}
    for name, values in zip(section.labels, section.values, strict=True):
        traces = []
        for system in (s for s in section.systems if s in set(values["system"])):
            rows = values[values["system"] == system].sort_values("iteration")
            style = styles[system]
            traces.append(
                go.Scatter(
                    mode="lines+markers",
                    name=plot_label(system),
                    meta={"system": system},
                    x=rows["round"].tolist(),
                    y=rows[THROUGHPUT.column].tolist(),
                    line={"color": style.colour, "dash": style.dash, "width": 1.4},
                    marker=line_marker(style, exact=section.systems[system]["exact"], size=5),
                    hovertemplate="<b>%{fullData.name}</b><br>round %{x}: %{y:,.0f} tokens/s<extra></extra>",
                )
            )
        layout = base_layout()
        layout.xaxis.update(title={"text": "round"}, showgrid=False)
        if values["round"].nunique() <= _MOST_ROUND_TICKS:
            layout.xaxis.dtick = 1
        layout.yaxis.update(title={"text": "tokens/s"}, tickformat="~s", rangemode="tozero")
        variants[name] = figure_json(traces, layout)
    note = "In a round every system runs once, on the same batch. Rounds that are slow for all tell of the machine"
    return Plot("rounds", "Throughput round by round", "tokens/s", note, variants, dict.fromkeys(variants, _HEIGHT))


def _drift(section: Section) -> list[Plot]:
    """The machine's own speed over the rounds; nothing where no yardstick was measured."""
    runs = zip(section.labels, section.runs, strict=True)
    variants = {name: yardstick_plot.drift(run) for name, run in runs if run.yardstick is not None}
    note = f"A fixed piece of work on the slowest rank. Marked: rounds in which it moved by over {MOVED:.0%}"
    plot = Plot("yardstick", "Drift of the machine", "ratio", note, variants, dict.fromkeys(variants, _HEIGHT))
    return [plot] if variants else []


def _breakdown(section: Section) -> Plot:
    """Phases of a MoE layer, stacked, per system and rank."""
    variants, height = {}, {}
    per_rank = all(len(run.systems) * run.manifest["world_size"] <= _MOST_BARS for run in section.runs)
    for name, run in zip(section.labels, section.runs, strict=True):
        bars = breakdown_plot.bars_of(run, list(section.systems), per_rank=per_rank)
        variants[name], height[name] = breakdown_plot.stacked(bars), 60 + _ROW_HEIGHT * len(bars.rows)
    whose = "per rank" if per_rank else "mean over ranks"
    note = f"Medians over rounds of means over MoE layers, {whose}. Click a phase in the legend to hide it"
    return Plot("breakdown", "Time in a MoE layer, phase by phase", "ms", note, variants, height)
