"""What the sweeps over one option of HarMoEny share: its systems in one run, by the value of the option."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.data.paper_values import CITATION
from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import PAGE_IN, entries_of, new_figure, panel_title, set_caption, set_legend
from analysis.present.panel import RATIO_TO_BEST_BASELINE, THROUGHPUT, Panel, panel
from analysis.present.style import label, look

#: With more values than these their labels are turned.
_MOST_TICKS = 6


def sweep_table(data: FigureData, option: str, panels: tuple[Panel, ...]) -> pd.DataFrame:
    """Return the systems of HarMoEny's policy by an option's value, with medians and intervals.

    Args:
        data: one run.
        option: an option of the policy.
        panels: what is to be drawn.

    Returns:
        Columns: the option, ``system``, ``derived`` (the configuration left the value open) and, for every panel, its
        column with ``_low`` and ``_high``; ordered by the option.
    """
    run = data.runs[0]
    rows = []
    for row in data.summary.to_dict("records"):
        system = run.systems[row["system"]]
        if not _has(system, option):
            continue
        rows.append(
            {
                # The simulator writes what calibration filled in beside the options.
                option: system["options"][option] or system.get(option),
                "system": row["system"],
                "derived": run.config["systems"][row["system"]].get(option) is None,
                **{f"{p.column}{end}": row[f"{p.column}{end}"] for p in panels for end in ("", "_low", "_high")},
            }
        )
    return pd.DataFrame(rows).sort_values(option, ignore_index=True)


def speed_panel(data: FigureData) -> Panel:
    """Return the ratio to the best baseline where there is one, else throughput."""
    return RATIO_TO_BEST_BASELINE if RATIO_TO_BEST_BASELINE.column in data.summary else panel(THROUGHPUT.column)


def missing_sweep(data: FigureData, option: str, source: Source) -> str | None:
    """Say that one run with several values of the option is needed, unless that is what there is."""
    wanted = f"needs one run with several values of {option}: {source.command}"
    if len(data.runs) != 1:
        return wanted
    run = data.runs[0]
    values = {system["options"][option] for system in run.systems.values() if _has(system, option)} - {None}
    return None if len(values) > 1 else wanted


def _has(system: Mapping[str, Any], option: str) -> bool:
    """Return whether a system is one of ours with this option."""
    return str(system["policy"]).startswith("harmoeny") and option in system["options"]


def plot_sweep(
    data: FigureData,
    frame: pd.DataFrame,
    option: str,
    axis_label: str,
    panels: tuple[Panel, ...],
    published: tuple[Panel, pd.DataFrame] | None = None,
) -> Figure:
    """Draw a line per panel with 95 % intervals; a star marks the value that was derived.

    Args:
        data: what the figure is drawn from.
        frame: as :func:`sweep_table` returns it.
        option: the option on the horizontal axis.
        axis_label: its name for people.
        panels: from left to right.
        published: a further panel, and published values of its column by ``option``, drawn as open markers.
    """
    everything = (*panels, published[0]) if published else panels
    figure = new_figure(PAGE_IN, 3.3)
    for axes, shown in zip(figure.subplots(1, len(everything)), everything, strict=True):
        _line(axes, frame, option, shown)
        axes.set_xlabel(axis_label)
        axes.set_title(panel_title(shown.title, len(everything)), loc="left")
    caption = data.caption
    if published:
        _open_markers(figure.axes[-1], published[1], option, published[0].column)
        caption += f" Open markers: published, {CITATION}."
    set_legend(figure, entries_of(figure.axes[-1]))
    set_caption(figure, caption)
    return figure


def _open_markers(axes: Axes, published: pd.DataFrame, option: str, column: str) -> None:
    """Draw published values, and make room for them on both axes."""
    axes.plot(
        published[option], published[column], "o", markersize=4.5, markerfacecolor="white", markeredgecolor="black",
        linestyle=":", color="#777777", linewidth=0.8, zorder=4, label="Published",
    )  # fmt: skip
    _ticks(axes, [*axes.get_xticks(), *published[option]])
    axes.set_ylim(top=max(axes.get_ylim()[1], 1.1 * float(published[column].max())))


def _ticks(axes: Axes, values: Iterable[float]) -> None:
    """Label these values on the horizontal axis, and no others."""
    ticks = sorted(set(values))
    crowded = len(ticks) > _MOST_TICKS
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], rotation=60 if crowded else 0, fontsize=7 if crowded else 8)
    axes.minorticks_off()


def _line(axes: Axes, frame: pd.DataFrame, option: str, shown: Panel) -> None:
    """Draw HarMoEny's line with intervals, and a star at the value that the harness derives."""
    style = look("harmoeny")
    middle, low, high = (frame[f"{shown.column}{end}"].to_numpy(dtype=float) for end in ("", "_low", "_high"))
    axes.errorbar(
        frame[option],
        middle,
        yerr=np.maximum([middle - low, high - middle], 0),
        color=style.colour,
        marker=style.marker,
        markersize=4,
        linewidth=1.2,
        capsize=2,
        label=label("harmoeny"),
    )
    derived = frame[frame["derived"] & frame[option].notna()]  # the simulator leaves open what no option sets
    if len(derived):
        axes.plot(
            derived[option], derived[shown.column], "*", color="black", markersize=11, linestyle="none", zorder=3,
            label="value that the harness derives",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    _ticks(axes, frame.loc[~frame["derived"], option])
    axes.set_ylim(0, 1.1 * float(high.max()))
