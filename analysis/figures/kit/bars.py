"""What figures share that compare systems by groups of bars, with published values as open markers beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.container import BarContainer
from matplotlib.patches import Rectangle

from analysis.data.load import Run
from analysis.data.paper_values import CITATION, beside, load_published, on_papers_machine, with_batches
from analysis.figures.kit.base import FigureData
from analysis.present.panel import THROUGHPUT, TTFT, TTFT_PER_SEQUENCE, Panel, panel
from analysis.present.style import label, look, marked

_ENDS = ("", "_low", "_high")
#: What relative values are relative to: the same everywhere, exact, and without a mechanism of its own.
_REFERENCE = "static_ep"
PUBLISHED = "Published"
#: A bar so many times as high as the systems' typical highest one is cut off.
_TALL = 3.0
#: A whisker that ends at so many times the height of the highest bar is cut off too, and then where the axis ends.
_LONG, _ABOVE = 1.6, 1.35


RELATIVE = "throughput_relative"


class Comparison(NamedTuple):
    """What a figure of systems draws.

    Attributes:
        frame: rows of the summary with what the panels need.
        panels: from left to right.
        published: rows per axis value and system, with the columns of the panels that they are drawn in; may
            be empty.
        caption: what has to be said of them.
    """

    frame: pd.DataFrame
    panels: list[Panel]
    published: pd.DataFrame
    caption: str


def compare(
    data: FigureData, frame: pd.DataFrame, axis: str, table: str, routed: Callable[[Run], bool], at: float | None
) -> Comparison:
    """Choose the panels, and the published values to draw in them.

    Where batches differ from system to system, the time to first token is that per sequence, as the paper reports it: a
    system with a smaller batch would otherwise look fast. Published absolute values are drawn only beside runs on the
    paper's machine and model, with its routing and as many sequences; elsewhere only ratios, and only if asked for.

    Args:
        data: what the figure is drawn from.
        frame: the rows of its summary that are drawn.
        axis: the column with the groups.
        table: the published one.
        routed: whether a run had the table's routing.
        at: the group whose Static EP relative values refer to; None: the same group's.
    """
    runs = [run for run in data.runs if run.manifest["run_id"] in set(frame["run_id"])]
    frame = with_batches(frame, runs)
    differ = bool((frame.groupby(axis)["num_sequences"].nunique() > 1).any())
    panels = [THROUGHPUT, TTFT_PER_SEQUENCE if differ else TTFT]
    notes = ["Batches differ by system."] if differ else []
    published = pd.DataFrame(columns=[axis, "system"])
    same = all(on_papers_machine(run) and routed(run) for run in runs)
    if data.published is not False and (same or data.published):
        found = beside(frame, axis, load_published(table), same_batch=same)
        if same:
            published = found
        else:
            frame, found = _relative(frame, axis, at), _relative(found, axis, at)
            published = found[[axis, "system", RELATIVE]].dropna()
            where = "" if at is None else f" at {axis.rsplit('.', 1)[-1]} {at:g}"
            if not published.empty:
                relative = panel(RELATIVE)
                panels.append(relative.renamed(relative.name + where))
        if not published.empty:
            scale = "" if same else f", to the published value of {label(_REFERENCE)}; another machine and model"
            notes.append(f"Open markers: published, {CITATION}{scale}.")
    return Comparison(frame, panels, published, " ".join(notes))


def _relative(frame: pd.DataFrame, axis: str, at: float | None) -> pd.DataFrame:
    """Add throughput over the reference's; NaN where there is no reference."""
    reference = frame[frame["system"] == _REFERENCE].set_index(axis)[THROUGHPUT.column].astype(float)
    base = frame[axis].map(reference).astype(float) if at is None else reference.get(at, np.nan)
    ends = [end for end in _ENDS if f"{THROUGHPUT.column}{end}" in frame]
    return frame.assign(**{f"{RELATIVE}{end}": frame[f"{THROUGHPUT.column}{end}"] / base for end in ends})


def comparison_table(comparison: Comparison, axes: Sequence[str], axis: str) -> pd.DataFrame:
    """Return medians and intervals per point of ``axes`` and system.

    Published values that are drawn at ``axis`` stand in columns ``published_...``.
    """
    columns = [f"{panel.column}{end}" for panel in comparison.panels for end in ("", "_low", "_high")]
    table = comparison.frame[[*axes, "system", *columns]]
    drawn = [panel.column for panel in comparison.panels if panel.column in comparison.published]
    if not drawn:
        return table
    names = {column: f"published_{column}" for column in drawn}
    published = comparison.published[[axis, "system", *drawn]].rename(columns=names)
    return table.merge(published, on=[axis, "system"], how="left")


def grouped_bars(
    axes: Axes,
    frame: pd.DataFrame,
    axis: str,
    groups: Sequence[Any],
    column: str,
    scale: float,
    published: pd.DataFrame | None = None,
) -> None:
    """Draw a group of bars per value, a bar per system with its 95 % interval, and bounds as lines across the group.

    Args:
        axes: where.
        frame: rows of a summary; one per value and system.
        axis: its column with the values.
        groups: the values, from left to right, at 0, 1, ...
        column: what is drawn, with its ``_low`` and ``_high``.
        scale: factor of what is drawn.
        published: rows by ``axis`` and ``system``; drawn as open markers on the bars if it has the column.
    """
    systems = list(dict.fromkeys(frame.loc[~frame["bound"], "system"]))
    width = 0.8 / max(1, len(systems))
    for i, system in enumerate(systems):
        rows = frame[frame["system"] == system].set_index(axis).reindex(groups)
        exact = bool(rows["exact"].dropna().iloc[0])
        middle, low, high = (rows[f"{column}{end}"].to_numpy(dtype=float) * scale for end in _ENDS)
        positions = np.arange(len(groups)) + (i - (len(systems) - 1) / 2) * width
        axes.bar(
            positions,
            middle,
            width * 0.92,
            yerr=np.maximum([middle - low, high - middle], 0),
            label=marked(system, _known(rows)) + ("" if exact else " (drops tokens)"),
            color=look(system).colour if exact else "white",
            edgecolor=look(system).colour,
            hatch="" if exact else "////",
            error_kw={"elinewidth": 0.9, "capsize": min(2.0, 12 * width), "ecolor": "#222222"},
        )
        if published is not None and column in published:
            there = published[published["system"] == system].set_index(axis)[column].reindex(groups)
            _open_markers(axes, positions, there.to_numpy(dtype=float) * scale)
    for bound in dict.fromkeys(frame.loc[frame["bound"], "system"]):
        rows = frame[frame["system"] == bound].set_index(axis).reindex(groups)
        values = rows[column].to_numpy(dtype=float) * scale
        left = np.arange(len(groups)) - 0.42
        axes.hlines(values, left, left + 0.84, colors=look(bound).colour, linestyles="dashed", label=label(bound))


def _known(rows: pd.DataFrame) -> object:
    return next(iter(rows["knows"].dropna()), None) if "knows" in rows else None


def limit_height(axes: Axes) -> None:
    """End the axis above the bars; those of systems so far off that nobody could read the others are cut off.

    Their values are written into them, with the published ones. So are whiskers, whose ends are written beside them.
    """
    axes.set_ylim(bottom=0)
    by_system = [[bar.get_height() for bar in bars] for bars in axes.containers if isinstance(bars, BarContainer)]
    if not by_system:
        return
    limit = _TALL * float(np.median([np.nanmax(heights) for heights in by_system]))
    kept = [height for heights in by_system for height in heights if height <= limit]
    if len(kept) < sum(len(heights) for heights in by_system) - int(np.isnan(np.concatenate(by_system)).sum()):
        top = 1.2 * max(kept)
        axes.set_ylim(0, top)
        _write_heights(axes, limit, top)
    elif any(end > _LONG * max(kept) for _, end in _whisker_ends(axes)):
        top = max(_ABOVE * max(kept), 1.05 * _highest_mark(axes))
        axes.set_ylim(0, top)
        _write_ends(axes, top)


def _whisker_ends(axes: Axes) -> list[tuple[float, float]]:
    """Return where the bars' whiskers end above, as positions and values."""
    lines = [bars.errorbar for bars in axes.containers if isinstance(bars, BarContainer) and bars.errorbar is not None]
    segments = [segment for line in lines for stems in line[2] for segment in stems.get_segments()]
    # Matplotlib leaves out ends that are no numbers.
    return [(float(segment[1][0]), float(segment[1][1])) for segment in segments if len(segment) == 2]


def _highest_mark(axes: Axes) -> float:
    """Return the highest published value, or line across a group; 0 where there is none."""
    published = [y for line in axes.lines if line.get_label() == PUBLISHED for y in np.asarray(line.get_ydata())]
    drawn = [lines for lines in axes.collections if isinstance(lines, LineCollection)]
    ends = [segment[:, 1] for lines in drawn for segment in lines.get_segments() if len(segment) == 2]
    across = [start for start, end in ends if start == end]
    return float(np.nanmax([0.0, *published, *across]))


def _write_ends(axes: Axes, top: float) -> None:
    """Write beside every whisker that ends above ``top``, where the axis ends, where it does."""
    for x, end in _whisker_ends(axes):
        if end > top:
            axes.plot(x, 0.985 * top, "^", markersize=3.5, color="#222222", zorder=4)
            axes.annotate(
                f"{end:.2g}" if end < 100 else f"{end:.0f}", (x, 0.985 * top), xytext=(3, 0),
                textcoords="offset points", rotation=90, ha="left", va="top", fontsize=7, zorder=4,
            )  # fmt: skip


def _write_heights(axes: Axes, limit: float, top: float) -> None:
    """Write into every bar above ``limit`` how high it is, and the published value; the axis ends at ``top``."""
    published = {
        round(float(x), 6): float(y)
        for line in axes.lines
        if line.get_label() == PUBLISHED
        for x, y in np.asarray(line.get_xydata())
    }
    drawn = [bar for bars in axes.containers if isinstance(bars, BarContainer) for bar in bars]
    for bar in (bar for bar in drawn if bar.get_height() > limit):
        centre = bar.get_x() + bar.get_width() / 2
        beside = published.get(round(centre, 6), np.nan)
        text = f"{bar.get_height():.3g}" + ("" if np.isnan(beside) else f"; published {beside:.3g}")
        hatched = bool(bar.get_hatch())
        axes.text(
            centre, top * 0.98, text, rotation=90, ha="center", va="top", fontsize=7, zorder=3,
            color="black" if hatched else "white",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5} if hatched else None,
        )  # fmt: skip
        if hatched:  # its outline, which the text's box would hide
            axes.add_patch(
                Rectangle(
                    bar.get_xy(), bar.get_width(), bar.get_height(), fill=False, edgecolor=bar.get_edgecolor(),
                    linewidth=bar.get_linewidth(), zorder=4,
                )
            )  # fmt: skip


def _open_markers(axes: Axes, positions: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
    axes.plot(
        positions, values, "o", markersize=4.5, markerfacecolor="white", markeredgecolor="black", markeredgewidth=0.9,
        linestyle="none", zorder=4, label=PUBLISHED,
    )  # fmt: skip
