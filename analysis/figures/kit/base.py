"""What a figure is, which experiment it comes from, and how it is saved."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

import analysis.figures
from analysis.data.load import Run
from analysis.data.summary import summarise
from analysis.present.layout import save_figure
from analysis.present.style import RC
from analysis.present.table import figure_caption, summary_frame
from results_schema.atomic import write_text


@dataclass(frozen=True)
class FigureData:
    """What figures are drawn from.

    Attributes:
        summary: one row per run and system (`analysis.present.table.summary_frame`).
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


@dataclass(frozen=True)
class Source:
    """The experiment that gives what a figure is drawn from.

    Attributes:
        experiment: its name.
        minutes: what it takes on real ranks, two cores; None: only the simulator can run it.
        simulated: what ``run.py`` simulates in seconds instead.
    """

    experiment: str
    minutes: float | None
    simulated: str

    @property
    def command(self) -> str:
        """The experiment as it is."""
        return f"python run.py experiment={self.experiment}"

    @property
    def simulation(self) -> str:
        """A simulation that gives the figure, in seconds."""
        return f"python run.py {self.simulated}"


#: Real routing on texts, by a model small enough to be executed here in seconds, on cores that are simulated.
SIMULATED_TEXTS = (
    "experiment=dataset_sweep backend=simulator hardware=cpu_core model=switch_mini model.hidden_size=256 "
    "model.intermediate_size=1536 batch_size=2 seq_len=128 rounds=5 "
    "system=[harmoeny,static_ep,even_split,eplb,fastermoe,drop]"
)


#: What the reason of a figure begins with whose own code failed.
FAILED = "failed:"


class FigureModule(Protocol):
    """A module of this package: ``NAME``, ``SOURCE``, ``missing``, ``table`` and ``plot``."""

    NAME: str
    SOURCE: Source

    def missing(self, data: FigureData) -> str | None:
        """Say what the results lack for this figure, with the command that gives it; None where nothing."""

    def table(self, data: FigureData) -> pd.DataFrame:
        """Return the numbers that are drawn."""

    def plot(self, data: FigureData) -> Figure:
        """Draw."""


def discover() -> list[FigureModule]:
    """Import all figure modules, by name.

    Raises:
        TypeError: a module in ``analysis/figures`` is no figure, or lacks a part of one.
    """
    modules = []
    for info in sorted(pkgutil.iter_modules(analysis.figures.__path__), key=lambda i: i.name):
        if info.ispkg or info.name == "__main__":
            continue
        module = importlib.import_module(f"analysis.figures.{info.name}")
        lacking = [name for name in ("NAME", "SOURCE", "missing", "table", "plot") if not hasattr(module, name)]
        if lacking:
            raise TypeError(f"{module.__name__}: no figure, it lacks {', '.join(lacking)}; helpers go to figures/kit")
        modules.append(cast(FigureModule, module))
    return modules


def figure_data(runs: Sequence[Run], points: Sequence[Mapping[str, Any]], published: bool | None = None) -> FigureData:
    """Prepare runs for drawing.

    Args:
        runs: at least one.
        points: their values of the options that tell them apart.
        published: as in `FigureData`.
    """
    frame = summary_frame(runs, [summarise(run) for run in runs], points)
    return FigureData(frame, list(points[0]), figure_caption(frame), runs, published)


def draw_all(data: FigureData, folder: Path, only: Collection[str] | None = None) -> tuple[list[Path], dict[str, str]]:
    """Draw every figure that the results allow, as PNG, PDF and the CSV behind it.

    Args:
        data: the results.
        folder: where to put them; is created.
        only: names of figures; None: all.

    Returns:
        The PNG files, and for each figure that could not be drawn the reason.
    """
    drawn, lacking = [], {}
    for module in discover():
        if only is not None and module.NAME not in only:
            continue
        try:
            reason = module.missing(data)
            if reason is None:
                drawn.append(_draw(module, data, folder))
                continue
        except OSError:
            raise  # a full disk is no fault of the figure
        except Exception as error:  # noqa: BLE001  (one figure must not take all that was measured with it)
            reason = f"{FAILED} {type(error).__name__}: {' '.join(str(error).split())}"
        lacking[module.NAME] = reason
    return drawn, lacking


def _draw(module: FigureModule, data: FigureData, folder: Path) -> Path:
    with mpl.rc_context(cast(Any, RC)):
        path = save_figure(module.plot(data), folder, module.NAME)
    write_text(folder / f"{module.NAME}.csv", module.table(data).to_csv(index=False))
    return path
