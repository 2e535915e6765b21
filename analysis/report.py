"""Table and figures of a sweep or a single run, printed and saved beside the results."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis.figures.base import FigureData, draw_all
from analysis.load import Run, Sweep
from analysis.summary import summarise
from analysis.table import as_text, build_table, figure_caption, summary_frame


def report_runs(runs: Sequence[Run], points: Sequence[Mapping[str, Any]], title: str, folder: Path) -> None:
    """Print the table, and save table and figures in ``folder``.

    Args:
        runs: the runs, at least one.
        points: their values of the options that tell them apart.
        title: of the table.
        folder: is created.
    """
    frame, axes = summary_frame(runs, [summarise(run) for run in runs], points), list(points[0])
    table = build_table(frame, axes, title)
    console = Console()
    # Where nobody watches, the width is the terminal's default, too narrow for the table.
    console.print(table) if console.is_terminal else print(as_text(table), end="")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "table.txt", as_text(table))
    _write(folder / "table.csv", frame.to_csv(index=False))
    drawn, _ = draw_all(FigureData(frame, axes, figure_caption(frame), runs), folder / "figures")
    for path in drawn:
        console.print(f"figure: {path} (and .pdf, .csv)", highlight=False, soft_wrap=True)
    console.print(f"table:  {folder / 'table.csv'}", highlight=False, soft_wrap=True)


def report_sweep(sweep: Sweep) -> None:
    """Report what is finished of a sweep, and name what is not."""
    if sweep.runs:
        report_runs(sweep.runs, sweep.points, sweep.experiment, sweep.folder)
    for run_id in sweep.missing:
        print(f"missing: {run_id} (start the same command again)")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
