"""What notebooks start from: the results in a folder, and one figure of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.figure import Figure

from analysis.data.load import Run, find_runs, load_sweep, sweep_folders
from analysis.figures.kit.base import FigureData, discover, figure_data
from analysis.present.style import RC
from analysis.present.table import skew_points
from results_schema.files import SWEEP


def load_results(folder: str | Path, command: str = "python run.py experiment=skew_sweep") -> FigureData:
    """Load the results in a folder: those of its newest sweep, or all runs where there is no sweep.

    Args:
        folder: of a sweep, of an experiment (``results/skew_sweep``) or of a run.
        command: makes such results.

    Raises:
        ValueError: nothing finished is there, or it is damaged.
    """
    folder = Path(folder)
    newest_first = sorted(sweep_folders(folder), key=lambda path: (path / SWEEP).stat().st_mtime, reverse=True)
    for path in newest_first:
        sweep = load_sweep(path)
        if sweep.runs:
            return figure_data(sweep.runs, sweep.points)
    runs = find_runs(folder) if folder.is_dir() else []
    if not runs:
        raise ValueError(f"{folder}: no finished run in it; make some in the repository's root: {command}")
    return figure_data(runs, skew_points(runs))


def of_run(run: Run) -> FigureData:
    """Return one run of a sweep, for figures that show one."""
    return figure_data([run], skew_points([run]))


def draw(name: str, data: FigureData) -> Figure:
    """Draw one figure.

    Args:
        name: a module of ``analysis.figures``.
        data: its results.

    Raises:
        ValueError: there is no such figure, or the results lack what it needs.
    """
    modules = {module.NAME: module for module in discover()}
    if name not in modules:
        raise ValueError(f"figure: {name!r}, must be one of {', '.join(modules)}")
    reason = modules[name].missing(data)
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    with mpl.rc_context(cast(Any, RC)):
        return modules[name].plot(data)
