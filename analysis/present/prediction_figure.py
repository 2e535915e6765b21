"""The validation figures: predicted against measured values, point by point, of one machine and of several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.present.layout import PAGE_IN, entries_of, new_figure, save_figure, set_caption, set_legend
from analysis.present.style import RC, label, look


def draw_validation(frame: pd.DataFrame, folder: Path, name: str, quantity: str, caption: str) -> Path:
    """Draw predicted against measured values as PNG and PDF.

    Args:
        frame: rows with system, case, published, predicted, error and calibration.
        folder: where to put them.
        name: start of the files' names.
        quantity: what was measured, and its unit.
        caption: what measured, and what predicted.

    Returns:
        The PNG file.
    """
    with mpl.rc_context(cast(Any, RC)):
        return save_figure(plot(frame, quantity, caption), folder, f"{name}_validation")


def draw_machines(machines: Mapping[str, pd.DataFrame], folder: Path, name: str) -> Path:
    """Draw predicted against measured values of several machines as PNG and PDF; return the PNG file.

    Args:
        machines: by machine, rows as for :func:`draw_validation`.
        folder: where to put them.
        name: start of the files' names.
    """
    with mpl.rc_context(cast(Any, RC)):
        return save_figure(plot_machines(machines), folder, name)


def plot_machines(machines: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw a panel per machine, in whatever units its values have."""
    figure = new_figure(PAGE_IN, 3.2)
    panels = figure.subplots(1, len(machines), squeeze=False)[0]
    for axes, (machine, frame) in zip(panels, machines.items(), strict=True):
        for system, rows in frame.groupby("system", sort=False):
            for fitted, part in rows.groupby("calibration"):
                style, face = look(str(system)), "white" if fitted else look(str(system)).colour
                axes.plot(
                    part["published"], part["predicted"], marker=style.marker, linestyle="", color=style.colour,
                    markerfacecolor=face, markersize=4, label=_name_once(rows, system, fitted),
                )  # fmt: skip
        _set_diagonal(axes, frame)
        held_out = frame.loc[~frame["calibration"], "error"].abs()
        title = f"{machine}\n{len(held_out)} points\nmedian error {held_out.median():.1%}"
        axes.set_title(title, loc="left")
    set_legend(figure, entries_of(*panels))
    set_caption(
        figure,
        "Sequences/s (DGX-1, arXiv 2506.12417), ms of a MoE layer (two CPU cores, ranks of an H100 and of an H200, "
        "measured), ms and speed-ups (H200, measured and published; results/validation names each source). All "
        "predictions are the simulator's. Open markers: points that constants were fitted on; the errors are of the "
        "others. Band: 10 %.",
    )
    return figure


def _name_once(rows: pd.DataFrame, system: object, fitted: object) -> str | None:
    """Return the name of a system for the legend: with its held-out points or, where it has none, its fitted ones."""
    return label(str(system)) if bool(fitted) == bool(rows["calibration"].all()) else None


def _set_diagonal(axes: Axes, frame: pd.DataFrame) -> None:
    """Draw where predictions are right, with a band of 10 %, on logarithmic axes."""
    values = frame[["published", "predicted"]]
    ends = np.array([values.min().min(), values.max().max()])
    axes.plot(ends, ends, color="#555555", linewidth=0.8)
    axes.fill_between(ends, ends * 0.9, ends * 1.1, color="#555555", alpha=0.12, linewidth=0)
    axes.set(xscale="log", yscale="log", xlabel="Measured", ylabel="Predicted")
    subs = (1.0, 2.0, 5.0) if ends[1] < 100 * ends[0] else (1.0,)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def plot(frame: pd.DataFrame, quantity: str, caption: str) -> Figure:
    """Draw the values on both axes to the left, and the errors by case to the right."""
    figure = new_figure(PAGE_IN, 3.9)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    cases, num_systems = list(dict.fromkeys(frame["case"])), frame["system"].nunique()
    for i, (system, rows) in enumerate(frame.groupby("system", sort=False)):
        style = look(str(system))
        for fitted, part in rows.groupby("calibration"):
            face = "white" if fitted else style.colour
            shared = {"marker": style.marker, "linestyle": "", "color": style.colour, "markerfacecolor": face}
            text = _name_once(rows, system, fitted)
            left.plot(part["published"], part["predicted"], label=text, markersize=5, **shared)
            offset = (i - (num_systems - 1) / 2) * 0.8 / num_systems
            positions = [cases.index(case) + offset for case in part["case"]]
            right.plot(positions, part["error"] * 100, markersize=5, **shared)
    _set_diagonal(left, frame)
    left.set_title(quantity, loc="left")
    right.axhspan(-10, 10, color="#555555", alpha=0.12, linewidth=0)
    for boundary in range(1, len(cases)):
        right.axvline(boundary - 0.5, color="#bbbbbb", linewidth=0.8)
    right.set_xticks(range(len(cases)), cases, rotation=0 if len(cases) <= 4 else 20)
    right.set_xlim(-0.5, len(cases) - 0.5)
    right.set_title("Error of the prediction (%); band: 10 %", loc="left")
    set_legend(figure, entries_of(left))
    fitted = " Open markers: points that constants were fitted on." if frame["calibration"].any() else ""
    set_caption(figure, caption + fitted)
    return figure
