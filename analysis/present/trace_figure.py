"""What a recorded routing is like, drawn: popularity of experts, drift from batch to batch, dependence of layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from analysis.present.layout import PAGE_IN, entries_of, new_figure, save_figure, set_caption, set_legend
from analysis.present.style import RC

FloatArray = npt.NDArray[np.float64]
_COLOUR, _DRIFT, _CHANCE = "#0072b2", "#d55e00", "#777777"
#: Loads below this share of an even one are drawn at the edge.
_LEAST = 0.01


@dataclass(frozen=True)
class TraceShape:
    """What is drawn of a recorded routing.

    Attributes:
        popularity: ``[num_layers, num_experts]``, load over an even share, by falling load.
        apart: ``[num_batches - 1]``, share of the assignments that would have to move between batches 1, 2, ... apart.
        chance: likewise, where nothing changes but chance.
        dependence: ``[num_layers, num_layers]``.
        dependence_title: what that is.
        caption: what was recorded.
    """

    popularity: FloatArray
    apart: FloatArray
    chance: FloatArray
    dependence: FloatArray
    dependence_title: str
    caption: str


def draw_trace(shape: TraceShape, folder: Path, name: str) -> Path:
    """Draw a recorded routing as PNG and PDF; return the PNG file."""
    with mpl.rc_context(cast(Any, RC)):
        return save_figure(plot(shape), folder, name)


def plot(shape: TraceShape) -> Figure:
    """Draw a panel for each."""
    figure = new_figure(PAGE_IN, 2.9)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 1))
    _popularity(left, shape.popularity)
    _drift(middle, shape)
    image = right.imshow(
        shape.dependence, vmin=min(0.0, float(shape.dependence.min())), vmax=1, cmap="cividis", origin="lower"
    )
    right.set(xlabel="MoE layer", ylabel="MoE layer")
    for axis in (right.xaxis, right.yaxis, middle.xaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    right.set_title(shape.dependence_title, loc="left")
    right.grid(visible=False)
    figure.colorbar(image, ax=right, shrink=0.8)
    set_legend(figure, entries_of(left, middle))
    set_caption(figure, shape.caption)
    return figure


def _popularity(axes: Axes, popularity: FloatArray) -> None:
    """Draw the load of the most popular, second, ... expert: median over layers, and from the least to the most."""
    rank = np.arange(1, popularity.shape[1] + 1)
    axes.fill_between(
        rank, popularity.min(axis=0), popularity.max(axis=0), color=_COLOUR, alpha=0.2, linewidth=0, label="all layers"
    )
    axes.plot(rank, np.median(popularity, axis=0), color=_COLOUR, label="median layer")
    axes.axhline(1.0, color=_CHANCE, linewidth=0.8, linestyle=":")
    axes.set(xlabel="Expert, by falling load", yscale="log", ylim=(max(_LEAST, popularity.min() * 0.8), None))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title("Load over an even share", loc="left")


def _drift(axes: Axes, shape: TraceShape) -> None:
    axes.set(
        xlabel="Batches apart", ylim=(0, 100 * max(shape.apart.max(initial=0.01), shape.chance.max(initial=0.01)) * 1.1)
    )
    axes.set_title("Load on other experts (%)", loc="left")
    if not len(shape.apart):
        axes.text(0.5, 0.5, "one batch", ha="center", va="center", transform=axes.transAxes, color=_CHANCE)
        return
    lags = np.arange(1, len(shape.apart) + 1)
    marker = "o" if len(lags) == 1 else None
    axes.plot(lags, 100 * shape.apart, color=_DRIFT, marker=marker, label="other batches")
    axes.plot(lags, 100 * shape.chance, color=_CHANCE, linestyle="--", marker=marker, label="by chance alone")
