"""What figures share that compare systems by lines."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.figures.kit.bars import PUBLISHED
from analysis.present.style import look, marked


def system_line(
    axes: Axes,
    system: str,
    x: npt.ArrayLike,
    y: npt.ArrayLike,
    *,
    exact: bool,
    bound: bool,
    knows: object = None,
    ends: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
    mark_every: int | tuple[int, int] = 1,
) -> None:
    """Draw a system's line with its colour and marker.

    One that drops tokens is dashed with hollow markers, a bound is dashed without any, ours lie on top.

    Args:
        axes: where.
        system: the system.
        x: float ``[n]``.
        y: float ``[n]``.
        exact: whether it computes the model's output.
        bound: whether it is a reference, and no system.
        knows: what it may see of the routing, as in ``summary.json``; anything but a text: not known.
        ends: of the 95 % intervals, float ``[n]`` each; None: none are drawn.
        mark_every: distance between markers, in points; or the first point with one and the distance.
    """
    style, middle = look(system), np.asarray(y, dtype=float)
    ours = system.startswith("harmoeny")
    (line,) = axes.plot(
        np.asarray(x, dtype=float),
        middle,
        color=style.colour,
        marker="" if bound else style.marker,
        markerfacecolor=style.colour if exact else "white",
        markersize=4,
        markevery=mark_every,
        linewidth=1.6 if ours else 1.1,
        linestyle="-" if exact and not bound else "--",
        label=marked(system, knows) + ("" if exact else " (drops tokens)"),
        zorder=3 if ours else 2,
    )
    if ends is not None and not bound:
        low, high = (np.asarray(end, dtype=float) for end in ends)
        axes.errorbar(
            np.asarray(x, dtype=float), middle, yerr=np.maximum([middle - low, high - middle], 0), fmt="none",
            ecolor=style.colour, elinewidth=0.8, capsize=1.5, zorder=line.get_zorder(),
        )  # fmt: skip


def summary_lines(
    axes: Axes, summary: pd.DataFrame, axis: str, column: str, scale: float, *, apart: bool = False
) -> None:
    """Draw a line per system of a summary with its 95 % intervals, bounds last.

    Args:
        axes: where.
        summary: one row per system and value of ``axis``.
        axis: the column along the horizontal axis.
        column: what is drawn, with its ``_low`` and ``_high``.
        scale: factor of what is drawn.
        apart: draw the systems a little beside each other, so that none hides behind another that does as well.
    """
    bounds = set(summary.loc[summary["bound"], "system"])
    systems = sorted(dict.fromkeys(summary["system"]), key=lambda system: system in bounds)
    step = 0.011 * (summary[axis].max() - summary[axis].min()) if apart else 0.0
    for i, system in enumerate(systems):
        rows = summary[summary["system"] == system].sort_values(axis)
        middle, low, high = (rows[f"{column}{end}"] * scale for end in ("", "_low", "_high"))
        kind = rows.iloc[0]
        shift = step * (i - (len(systems) - 1) / 2)
        system_line(
            axes, system, rows[axis] + shift, middle, exact=kind["exact"], bound=kind["bound"],
            knows=kind.get("knows"), ends=(low, high),
        )  # fmt: skip


def published_points(axes: Axes, published: pd.DataFrame, axis: str, column: str, scale: float) -> None:
    """Draw published values as large open markers of their system's shape and colour.

    Args:
        axes: where.
        published: one row per system and value of ``axis``; nothing is drawn if it lacks the column.
        axis: the column along the horizontal axis.
        column: what is drawn.
        scale: factor of what is drawn.
    """
    if column not in published:
        return
    for system, rows in published.groupby("system", sort=False):
        style = look(str(system))
        axes.plot(
            rows[axis], rows[column] * scale, style.marker, markersize=7, markerfacecolor="none",
            markeredgecolor=style.colour, markeredgewidth=1.0, linestyle="none", zorder=4,
        )  # fmt: skip
    axes.margins(y=0.1)  # for the markers' size
    # One grey marker in the legend stands for all.
    axes.plot([], [], "o", markersize=7, markerfacecolor="none", markeredgecolor="#555555", label=PUBLISHED)


def decimal_log(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
