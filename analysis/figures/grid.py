"""Who wins where, and by how much: a map of machines, models, tokens per rank, routing and spare slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from analysis.data.ratios import point_ratios
from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import PAGE_IN, set_caption
from analysis.present.style import label, look
from analysis.present.table import without_whiskers

NAME = "grid"
SOURCE = Source("grid", minutes=None, simulated="experiment=grid")
#: From the outside to the inside: panels beside each other and their columns, panels below each other and their rows.
_ACROSS, _DOWN = ("machine", "seq_len", "spare_slots"), ("model", "router")
_OURS = "harmoeny"
#: Ratios further from 1 have the same colour.
_FURTHEST = 1.6
_TICKS = (0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
_EMPTY = "#e8e8e8"

#: float64 ``[..., 3]``.
Pixels = npt.NDArray[np.float64]


def missing(data: FigureData) -> str | None:
    """Say that a sweep over exactly these options is needed."""
    if set(data.axes) != {*_ACROSS, *_DOWN}:
        return f"needs a sweep over {', '.join((*_ACROSS, *_DOWN))}: {SOURCE.command}"
    if _OURS not in set(data.summary["system"]):
        return f"needs {_OURS} among the systems: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return our ratio to the best exact rival at every point, the lowest first, with who is best."""
    return point_ratios(data.summary, data.axes, _OURS)


def plot(data: FigureData) -> Figure:
    """Draw our ratio to the best exact rival above, and the fastest exact system below."""
    frame, rows = table(data), data.summary["router"].nunique() * data.summary["model"].nunique()
    figure = Figure(figsize=(PAGE_IN, 1.8 + 2 * (0.115 * rows + 0.45)), layout="constrained")
    parts = cast(Sequence[SubFigure], figure.subfigures(2, 1))
    _draw_ratios(parts[0], data, frame)
    _draw_winners(parts[1], data, frame)
    slots = ", ".join(map(str, _values(data, "spare_slots")))
    set_caption(
        figure,
        without_whiskers(data.caption, data.summary)
        + f" Every cell has a stripe per number of spare slots, from left to right {slots}; all systems have the same "
        "room for experts. Grey: not simulated.",
    )
    return figure


def _draw_ratios(part: SubFigure, data: FigureData, frame: pd.DataFrame) -> None:
    colours = ScalarMappable(LogNorm(1 / _FURTHEST, _FURTHEST, clip=True), "PuOr_r")
    panels = _draw_map(part, data, frame, colours.to_rgba(frame["ratio"].to_numpy())[:, :3])
    part.suptitle(f"{label(_OURS)}'s throughput to that of the best exact rival", fontsize=8, x=0.01, ha="left")
    bar = part.colorbar(colours, ax=panels.ravel().tolist(), aspect=30, pad=0.01, extend="both")
    bar.set_ticks(_TICKS, labels=[f"{tick:.3g}" for tick in _TICKS])
    bar.minorticks_off()


def _draw_winners(part: SubFigure, data: FigureData, frame: pd.DataFrame) -> None:
    winners = [str(name) for name in frame["winner"]]
    panels = _draw_map(part, data, frame, np.array([to_rgb(look(name).colour) for name in winners]))
    part.suptitle("The fastest exact system, with the number of points", fontsize=8, x=0.01, ha="left")
    patches = [Patch(color=look(name).colour, label=f"{label(name)} {n}") for name, n in Counter(winners).most_common()]
    part.legend(handles=patches, loc="outside right center", frameon=False, fontsize=7, handlelength=0.9)
    for axes in panels[-1]:
        axes.set_xlabel("Tokens per rank")


def _draw_map(part: SubFigure, data: FigureData, frame: pd.DataFrame, colours: Pixels) -> npt.NDArray[np.object_]:
    """Draw a panel per machine and model, with a colour (float64 ``[num_points, 3]``) per row of ``frame``."""
    machines, sizes, slots = (_values(data, axis) for axis in _ACROSS)
    models, routers = (_values(data, axis) for axis in _DOWN)
    images = {
        (model, machine): np.tile(np.array(to_rgb(_EMPTY)), (len(routers), len(sizes) * len(slots), 1))
        for model in models
        for machine in machines
    }
    for row, colour in zip(frame.to_dict("records"), colours, strict=True):
        column = sizes.index(row["seq_len"]) * len(slots) + slots.index(row["spare_slots"])
        images[row["model"], row["machine"]][routers.index(row["router"]), column] = colour
    panels = part.subplots(len(models), len(machines), sharex=True, sharey=True, squeeze=False)
    for axes, image in zip(panels.flat, images.values(), strict=True):
        _draw_panel(axes, image, sizes, len(slots))
    for axes, machine in zip(panels[0], machines, strict=True):
        axes.set_title(_text(machine), fontsize=7)
    for axes, model in zip(panels[:, 0], models, strict=True):
        axes.set_yticks(range(len(routers)), [_text(router) for router in routers])
        axes.set_ylabel(_text(model).removesuffix(" layers"), fontsize=7)
    return panels


def _draw_panel(axes: Axes, image: Pixels, sizes: Sequence[Any], num_slots: int) -> None:
    axes.imshow(image, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_xticks([(i + 0.5) * num_slots - 0.5 for i in range(len(sizes))], [_short(size) for size in sizes])
    for i in range(1, len(sizes)):
        axes.axvline(i * num_slots - 0.5, color="white", linewidth=1.2)
    for i in range(1, len(image)):
        axes.axhline(i - 0.5, color="white", linewidth=0.6)


def _values(data: FigureData, axis: str) -> list[Any]:
    return sorted(data.summary[axis].unique())


def _text(value: object) -> str:
    return str(value).replace("_", " ")


def _short(size: int) -> str:
    return f"{size // 1024}k" if size >= 1024 else str(size)
