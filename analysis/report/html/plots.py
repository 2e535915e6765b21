"""The report's interactive plots as Plotly figures: plain dictionaries, so that a report costs no import of Plotly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from analysis.data.breakdown import PARTS, breakdown
from analysis.data.load import Run
from analysis.present.style import PHASE_COLOURS, label
from analysis.report.html.plotly_style import PlotLook, looks, plot_label, plot_text
from analysis.report.html.section import Section, axis_name, point_label, value_text

#: More values of a numeric option than these are drawn as lines, fewer as groups of bars.
_BARS = 4
#: An axis whose values span this factor is logarithmic.
_LOG_SPAN = 16
#: With more bars than these the time breakdown shows means over ranks.
_MOST_BARS = 48
_HEIGHT, _ROW_HEIGHT, _BAR_ROW_HEIGHT = 300, 19, 30
_INK, _PAPER = "#444444", "#ffffff"


class Quantity(NamedTuple):
    """A metric to draw.

    Attributes:
        column: of the summary, with its ``_low`` and ``_high``.
        title: of the plot.
        unit: beside the title and the axis.
        better: in words.
        scale: factor of what is drawn.
        tick: Plotly's format of ticks.
        hover: Plotly's format of values.
    """

    column: str
    title: str
    unit: str
    better: str
    scale: float
    tick: str
    hover: str


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
    variants: dict[str, dict[str, Any]]
    height: dict[str, int] = field(default_factory=dict)


def plots_of(section: Section) -> list[Plot]:
    """Draw a section."""
    styles = looks(section.systems)
    drawn = [_metric_plot(section, styles, quantity) for quantity in _quantities(section.frame)]
    has_rounds = any(values["round"].nunique() > 1 for values in section.values)
    return [*drawn, *([_rounds(section, styles)] if has_rounds else []), _breakdown(section)]


def _quantities(frame: pd.DataFrame) -> list[Quantity]:
    ms = frame["ttft_s"].max() < 1
    quantities = [
        Quantity("throughput_tokens_per_s", "Throughput", "tokens/s", "higher is better", 1.0, "~s", ",.0f"),
        Quantity(
            "ttft_s", "Time to first token", "ms" if ms else "s", "lower is better", 1e3 if ms else 1.0, "~r", ",.4~r"
        ),
        Quantity(
            "idle_share", "Idle share", "of the MoE layers' time", "lower is better: ranks that wait for the slowest",
            1.0, ".0%", ".1%",
        ),
    ]  # fmt: skip
    ratio = "throughput_ratio_to_best_baseline"
    if ratio in frame and frame[ratio].notna().any():
        better = "higher is better; paired by round, the best exact baseline is 1"
        quantities.insert(1, Quantity(ratio, "Throughput to the best baseline", "ratio", better, 1.0, "~r", ".3f"))
    return quantities


def _metric_plot(section: Section, styles: dict[str, PlotLook], quantity: Quantity) -> Plot:
    note = quantity.better[0].upper() + quantity.better[1:] + _interval_note(section.frame)
    if not section.axes:
        figure = _by_system(section.frame, styles, quantity)
        height = 70 + _BAR_ROW_HEIGHT * len(figure["data"])
        return Plot(quantity.column, quantity.title, quantity.unit, note, {"": figure}, {"": height})
    axis, *others = section.axes
    groups: dict[str, list[int]] = {}
    for i, point in enumerate(section.points):
        groups.setdefault(point_label(point, others), []).append(i)
    variants = {}
    for name, members in groups.items():
        ids = {section.runs[i].manifest["run_id"]: section.points[i][axis] for i in members}
        rows = section.frame[section.frame["run_id"].isin(ids)]
        placed = rows.assign(_value=[ids[run_id] for run_id in rows["run_id"]])
        values = _ordered(list(dict.fromkeys(ids.values())))
        draw = _lines if _is_numeric(values) and len(values) > _BARS else _bars
        variants[name] = draw(placed, styles, quantity, values, axis)
    return Plot(quantity.column, quantity.title, quantity.unit, note, variants, dict.fromkeys(variants, _HEIGHT))


def _by_system(frame: pd.DataFrame, styles: dict[str, PlotLook], quantity: Quantity) -> dict[str, Any]:
    """One bar per system, from the top."""
    traces = []
    for row in frame.to_dict("records"):
        if pd.isna(row[quantity.column]):
            continue
        name = str(row["system"])
        middle, low, high = _scaled(row, quantity)
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": plot_label(name),
                "meta": {"system": name},
                "x": [middle],
                "y": [_wrapped(label(name))],
                "error_x": _error([middle], [low], [high]),
                "marker": _bar_marker(styles[name], exact=row["exact"], bound=row["bound"]),
                "customdata": [[low, high]],
                "hovertemplate": _hover(quantity, "x", ""),
                "showlegend": True,
            }
        )
    layout = _layout()
    layout["xaxis"] |= {"title": {"text": quantity.unit}, "tickformat": quantity.tick, "rangemode": "tozero"}
    layout["yaxis"] |= {"autorange": "reversed", "showgrid": False, "ticks": ""}
    layout |= {"bargap": 0.25, "barmode": "overlay"} | _reference_line(quantity, "x")
    return {"data": traces, "layout": layout}


def _bars(
    frame: pd.DataFrame, styles: dict[str, PlotLook], quantity: Quantity, values: Sequence[Any], axis: str
) -> dict[str, Any]:
    """Group bars by value; bounds are lines across the group."""
    place = {_plain(value): i for i, value in enumerate(values)}
    traces = []
    for name, rows, bound in _systems(frame, quantity):
        positions = [place[_plain(value)] for value in rows["_value"]]
        middle, low, high = _columns(rows, quantity)
        points = [f"{axis_name(axis)} {value_text(value)}" for value in rows["_value"]]
        trace: dict[str, Any] = {"name": plot_label(name), "meta": {"system": name}}
        if bound:
            trace |= {
                "type": "scatter",
                "mode": "lines",
                "x": [x for i in positions for x in (i - 0.42, i, i + 0.42, None)],
                "y": [y for value in middle for y in (value, value, value, None)],
                "customdata": [c for c in zip(low, high, points, strict=True) for _ in range(4)],
                "line": {"color": styles[name].colour, "dash": "dash", "width": 1.6},
            }
        else:
            trace |= {
                "type": "bar",
                "x": positions,
                "y": middle,
                "customdata": list(zip(low, high, points, strict=True)),
                "error_y": _error(middle, low, high),
                "marker": _bar_marker(styles[name], exact=bool(rows["exact"].iloc[0]), bound=False),
            }
        traces.append(trace | {"hovertemplate": _hover(quantity, "y", "%{customdata[2]}<br>")})
    layout = _layout()
    layout["xaxis"] |= {
        "title": {"text": axis_name(axis)},
        "tickmode": "array",
        "tickvals": list(range(len(values))),
        "ticktext": [plot_text(value_text(value)) for value in values],
        "range": [-0.5, len(values) - 0.5],
        "showgrid": False,
    }
    layout["yaxis"] |= {"title": {"text": quantity.unit}, "tickformat": quantity.tick, "rangemode": "tozero"}
    layout |= {"barmode": "group", "bargap": 0.16} | _reference_line(quantity, "y")
    return {"data": traces, "layout": layout}


def _lines(
    frame: pd.DataFrame, styles: dict[str, PlotLook], quantity: Quantity, values: Sequence[Any], axis: str
) -> dict[str, Any]:
    """Draw a line per system over a numeric option."""
    traces = []
    for name, rows, bound in _systems(frame, quantity):
        ordered = rows.sort_values("_value")
        middle, low, high = _columns(ordered, quantity)
        style = styles[name]
        points = [f"{axis_name(axis)} {value_text(value)}" for value in ordered["_value"]]
        exact = bool(rows["exact"].iloc[0])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plot_label(name),
                "meta": {"system": name},
                "x": [_plain(value) for value in ordered["_value"]],
                "y": middle,
                "customdata": list(zip(low, high, points, strict=True)),
                "error_y": _error(middle, low, high) | {"color": style.colour},
                "line": {"color": style.colour, "dash": "dash" if bound else style.dash, "width": 1.8},
                "marker": _line_marker(style, exact=exact),
                "hovertemplate": _hover(quantity, "y", "%{customdata[2]}<br>"),
            }
        )
    layout = _layout()
    layout["xaxis"] |= {"title": {"text": axis_name(axis)}, "tickmode": "array", "tickvals": list(values)} | {
        "ticktext": [value_text(value) for value in values]
    }
    if _spans(values):
        layout["xaxis"] |= {"type": "log"}
    layout["yaxis"] |= {"title": {"text": quantity.unit}, "tickformat": quantity.tick, "rangemode": "tozero"}
    if quantity.column == "throughput_tokens_per_s" and _spans(frame[quantity.column].dropna().tolist()):
        layout["yaxis"] |= {"type": "log", "dtick": 1}
    return {"data": traces, "layout": layout | _reference_line(quantity, "y")}


def _rounds(section: Section, styles: dict[str, PlotLook]) -> Plot:
    """Throughput round by round: what the medians are made of."""
    variants = {}
    for name, values in zip(section.labels, section.values, strict=True):
        traces = []
        for system in (s for s in section.systems if s in set(values["system"])):
            rows = values[values["system"] == system].sort_values("iteration")
            style = styles[system]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": plot_label(system),
                    "meta": {"system": system},
                    "x": rows["round"].tolist(),
                    "y": rows["throughput_tokens_per_s"].tolist(),
                    "line": {"color": style.colour, "dash": style.dash, "width": 1.4},
                    "marker": _line_marker(style, exact=section.systems[system]["exact"]) | {"size": 5},
                    "hovertemplate": "<b>%{fullData.name}</b><br>round %{x}: %{y:,.0f} tokens/s<extra></extra>",
                }
            )
        layout = _layout()
        layout["xaxis"] |= {"title": {"text": "round"}, "showgrid": False}
        if values["round"].nunique() <= 12:
            layout["xaxis"] |= {"dtick": 1}
        layout["yaxis"] |= {"title": {"text": "tokens/s"}, "tickformat": "~s", "rangemode": "tozero"}
        variants[name] = {"data": traces, "layout": layout}
    note = "In a round every system runs once, on the same batch. Rounds that are slow for all tell of the machine"
    return Plot("rounds", "Throughput round by round", "tokens/s", note, variants, dict.fromkeys(variants, _HEIGHT))


def _breakdown(section: Section) -> Plot:
    """Phases of a MoE layer, stacked, per system and rank."""
    variants, height = {}, {}
    per_rank = all(len(run.systems) * run.manifest["world_size"] <= _MOST_BARS for run in section.runs)
    for name, run in zip(section.labels, section.runs, strict=True):
        figure, rows = _stacked(section, run, per_rank=per_rank)
        variants[name], height[name] = figure, 60 + _ROW_HEIGHT * rows
    whose = "per rank" if per_rank else "mean over ranks"
    note = f"Medians over rounds of means over MoE layers, {whose}. Click a phase in the legend to hide it"
    return Plot("breakdown", "Time in a MoE layer, phase by phase", "ms", note, variants, height)


def _stacked(section: Section, run: Run, *, per_rank: bool) -> tuple[dict[str, Any], int]:
    frame = breakdown(run.layers)
    if not per_rank:
        frame = frame.drop(columns="rank").groupby("system", sort=False).mean().reset_index()
    order = {system: i for i, system in enumerate(section.systems)}
    frame = frame.sort_values("system", key=lambda names: names.map(order), kind="stable")
    systems = list(dict.fromkeys(frame["system"]))
    ranks = frame["rank"].map(lambda rank: f"rank {rank}") if per_rank else pd.Series("mean", index=frame.index)
    keys = [f"{order[system]}/{rank}" for system, rank in zip(frame["system"], ranks, strict=True)]
    heads = {system: f"{order[system]}/" for system in systems}
    names = [plot_label(system) for system in frame["system"]]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": part,
            "x": (frame[f"{part}_s"] * 1e3).tolist(),
            "y": keys,
            "customdata": [[n, r, s] for n, r, s in zip(names, ranks, frame["system"], strict=True)],
            "marker": _phase_marker(part),
            "hovertemplate": f"<b>%{{customdata[0]}}</b>, %{{customdata[1]}}<br>{part}: %{{x:.3~r}} ms<extra></extra>",
        }
        for part in PARTS
    ]
    rows = [
        key
        for system in systems
        for key in [heads[system], *(k for k, s in zip(keys, frame["system"], strict=True) if s == system)]
    ]
    layout = _layout()
    layout["xaxis"] |= {"title": {"text": "ms per MoE layer"}, "rangemode": "tozero", "side": "bottom"}
    layout["yaxis"] |= {
        "type": "category",
        "categoryorder": "array",
        "categoryarray": rows,
        "range": [len(rows) - 0.5, -0.6],
        "tickmode": "array",
        "tickvals": rows,
        "ticktext": ["" if key in heads.values() else key.split("/", 1)[1] for key in rows],
        "showgrid": False,
        "ticks": "",
        "fixedrange": True,
    }
    layout["annotations"] = [
        {
            "name": system,
            "text": f"<b>{plot_label(system)}</b>",
            "x": 0,
            "xref": "x",
            "xanchor": "left",
            "y": heads[system],
            "yref": "y",
            "yanchor": "middle",
            "yshift": -2,
            "showarrow": False,
        }
        for system in systems
    ]
    return {"data": traces, "layout": layout | {"barmode": "stack", "bargap": 0.12}}, len(rows)


def _systems(frame: pd.DataFrame, quantity: Quantity) -> list[tuple[str, pd.DataFrame, bool]]:
    """Return the systems with their rows, bounds last."""
    found = [
        (str(name), rows, bool(rows["bound"].iloc[0]))
        for name, rows in frame[frame[quantity.column].notna()].groupby("system", sort=False)
    ]
    return sorted(found, key=lambda entry: entry[2])


def _columns(rows: pd.DataFrame, quantity: Quantity) -> tuple[list[float], list[float], list[float]]:
    middle, low, high = (
        (rows[f"{quantity.column}{end}"] * quantity.scale).astype(float).tolist() for end in ("", "_low", "_high")
    )
    return middle, low, high


def _scaled(row: dict[Any, Any], quantity: Quantity) -> tuple[float, float, float]:
    middle, low, high = (float(row[f"{quantity.column}{end}"]) * quantity.scale for end in ("", "_low", "_high"))
    return middle, low, high


def _error(middle: Sequence[float], low: Sequence[float], high: Sequence[float]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(top - value, 0.0) for value, top in zip(middle, high, strict=True)],
        "arrayminus": [max(value - bottom, 0.0) for value, bottom in zip(middle, low, strict=True)],
        "thickness": 1.2,
        "width": 2.5,
        "color": _INK,
    }


def _bar_marker(style: PlotLook, *, exact: bool, bound: bool) -> dict[str, Any]:
    if exact and not bound:
        plain = {"color": style.colour, "line": {"color": style.colour, "width": 1}}
        pattern = {"shape": style.pattern, "fgcolor": _PAPER, "bgcolor": style.colour}
        return plain | {"pattern": pattern} if style.pattern else plain
    marker = {"color": _PAPER, "line": {"color": style.colour, "width": 1.3}}
    if bound:
        return marker
    return marker | {"pattern": {"shape": "/", "fgcolor": style.colour, "bgcolor": _PAPER, "size": 6, "solidity": 0.25}}


def _line_marker(style: PlotLook, *, exact: bool) -> dict[str, Any]:
    symbol = style.symbol if exact or style.symbol.endswith("-open") else f"{style.symbol}-open"
    return {"symbol": symbol, "color": style.colour, "size": 8, "line": {"color": style.colour, "width": 1.4}}


def _phase_marker(part: str) -> dict[str, Any]:
    if part != "idle":
        return {"color": PHASE_COLOURS[part], "line": {"color": _PAPER, "width": 0.5}}
    pattern = {"shape": "/", "fgcolor": "#999999", "bgcolor": _PAPER, "size": 5, "solidity": 0.2}
    return {"color": _PAPER, "line": {"color": "#999999", "width": 0.8}, "pattern": pattern}


def _hover(quantity: Quantity, axis: str, point: str) -> str:
    value, low, high = (f"%{{{name}:{quantity.hover}}}" for name in (axis, "customdata[0]", "customdata[1]"))
    unit = "" if quantity.hover.endswith("%") or quantity.unit == "ratio" else f" {quantity.unit}"
    return f"<b>%{{fullData.name}}</b><br>{point}{value}{unit} [{low}, {high}]<extra></extra>"


def _reference_line(quantity: Quantity, direction: str) -> dict[str, Any]:
    """Return a line where the best baseline is."""
    if quantity.unit != "ratio":
        return {}
    across, along = ("x", "y") if direction == "x" else ("y", "x")
    line = {"type": "line", f"{across}0": 1, f"{across}1": 1, f"{along}0": 0, f"{along}1": 1, f"{along}ref": "paper"}
    return {"shapes": [line | {"line": {"color": _INK, "width": 1, "dash": "dot"}, "layer": "above"}]}


def _layout() -> dict[str, Any]:
    axis = {"gridcolor": "#dddddd", "zeroline": False}
    return {
        "xaxis": {**axis, "ticks": "outside", "ticklen": 4, "automargin": True},
        "yaxis": {**axis, "automargin": False},  # its labels depend on the height, so that Plotly may find no end
        "hovermode": "closest",
        "margin": {"l": 56, "r": 12, "t": 8, "b": 48},
    }


def _interval_note(frame: pd.DataFrame) -> str:
    return ". Whiskers: 95 % bootstrap intervals" if frame["num_rounds"].max() > 1 else ""


def _ordered(values: list[Any]) -> list[Any]:
    return sorted(values) if _is_numeric(values) else values


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _spans(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= _LOG_SPAN


def _plain(value: Any) -> Any:
    """Return a value that can be a key and JSON."""
    return value if isinstance(value, int | float | str | bool) else str(value)


def _wrapped(text: str, width: int = 18) -> str:
    """Break a long name into lines."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(plot_text(line) for line in lines)
