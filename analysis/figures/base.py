"""What a figure is, and how it is saved."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

import analysis.figures
from analysis.load import Run
from analysis.style import RC


@dataclass(frozen=True)
class FigureData:
    """What figures are drawn from.

    Attributes:
        summary: one row per run and system (`analysis.table.summary_frame`).
        axes: swept options.
        caption: what the numbers were measured on.
        runs: the runs themselves, in the order of the summary.
        published: draw the values that the paper published as open markers: None, where model, machine and conditions
            are the paper's; True, elsewhere too, in a relative panel; False, never.
    """

    summary: pd.DataFrame
    axes: list[str]
    caption: str
    runs: Sequence[Run]
    published: bool | None = None


class FigureModule(Protocol):
    """A module of this package: ``NAME``, ``missing``, ``table`` and ``plot``."""

    NAME: str

    def missing(self, data: FigureData) -> str | None:
        """Say what the results lack for this figure, with the command that gives it; None where nothing."""

    def table(self, data: FigureData) -> pd.DataFrame:
        """Return the numbers that are drawn."""

    def plot(self, data: FigureData) -> Figure:
        """Draw."""


def discover() -> list[FigureModule]:
    """Import all figure modules, by name."""
    modules = []
    for info in sorted(pkgutil.iter_modules(analysis.figures.__path__), key=lambda i: i.name):
        module = importlib.import_module(f"analysis.figures.{info.name}")
        if hasattr(module, "NAME"):
            modules.append(cast(FigureModule, module))
    return modules


def draw_all(data: FigureData, folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Draw every figure that the results allow, as PNG, PDF and the CSV behind it.

    Returns:
        The PNG files, and for each figure that could not be drawn the reason.
    """
    drawn, lacking = [], {}
    for module in discover():
        reason = module.missing(data)
        if reason is not None:
            lacking[module.NAME] = reason
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with mpl.rc_context(cast(Any, RC)):
            figure = module.plot(data)
            for suffix in ("png", "pdf"):
                figure.savefig(folder / f"{module.NAME}.{suffix}", dpi=200)
        module.table(data).to_csv(folder / f"{module.NAME}.csv", index=False)
        drawn.append(folder / f"{module.NAME}.png")
    return drawn, lacking
