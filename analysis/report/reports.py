"""Report a sweep or a run: the table that is printed, the static figures, and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from analysis.data.load import Run, Sweep
from analysis.data.ratios import over_points
from analysis.figures.kit.base import FAILED, draw_all, figure_data
from analysis.present.ratio_table import MANY_POINTS, MANY_ROWS, build_ratio_table
from analysis.present.serving_table import RATE, build_serving_table, serving_frame, serving_table
from analysis.present.table import TEXT_WIDTH, as_text, build_table, failed_notes, noise_notes
from analysis.report.html.section import split_sections
from analysis.report.html.write import PAGE, reasons, title_of, write_page
from results_schema.atomic import write_text


@dataclass(frozen=True)
class Saved:
    """Table and figures of some runs.

    Attributes:
        frame: the table's numbers (`analysis.present.table.summary_frame`).
        table: as it is printed: of all points, or where there are too many, of systems over all of them.
        serving: the open loop's, printed below it; None: there is none.
        figures: the PNG files; a PDF and a CSV lie beside each.
        files: all of them.
        failed: by figure whose own code failed, how.
    """

    frame: pd.DataFrame
    table: Table
    serving: Table | None
    figures: list[Path]
    files: list[Path]
    failed: Mapping[str, str]


def save_tables(runs: Sequence[Run], points: Sequence[Mapping[str, Any]], title: str, folder: Path) -> Saved:
    """Save table and figures in ``folder``, silently.

    Args:
        runs: the runs, at least one.
        points: their values of the options that tell them apart.
        title: of the table.
        folder: is created.
    """
    data = figure_data(runs, points)
    notes = [*noise_notes(runs, points), *failed_notes(runs, points)]
    table = build_table(data.summary, data.axes, title, notes)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"table.txt": as_text(table), "table.csv": data.summary.to_csv(index=False)}
    if len(runs) > MANY_POINTS or len(data.summary) > MANY_ROWS:
        table = build_ratio_table(data.summary, data.axes, title)
        texts |= {"ratios.txt": as_text(table), "ratios.csv": over_points(data.summary).to_csv(index=False)}
    serving = None
    axes = [axis for axis in data.axes if axis != RATE and data.summary[axis].astype(str).nunique() > 1]
    if not (rates := serving_frame(runs, points, axes)).empty:
        serving = build_serving_table(serving_table(rates, axes, runs))
        texts |= {"serving.txt": as_text(serving), "serving.csv": rates.to_csv(index=False)}
    for name, text in texts.items():
        write_text(folder / name, text)
    drawn, lacking = draw_all(data, folder / "figures")
    files = [path.with_suffix(suffix) for path in drawn for suffix in (".png", ".pdf", ".csv")]
    failed = {name: reason for name, reason in lacking.items() if reason.startswith(FAILED)}
    return Saved(data.summary, table, serving, drawn, [*(folder / name for name in texts), *files], failed)


def report_runs(
    runs: Sequence[Run],
    points: Sequence[Mapping[str, Any]],
    title: str,
    folder: Path,
    missing: Sequence[str] = (),
) -> Saved:
    """Save table and figures in ``folder`` as :func:`save_tables` does, and the page; print the table and the paths.

    Args:
        runs: the runs, at least one.
        points: their values of the options that tell them apart.
        title: of the table.
        folder: is created.
        missing: what is known of runs of the sweep that are not finished.

    Raises:
        ValueError: a figure's own code failed; all else is saved by then.
    """
    saved = save_tables(runs, points, title, folder)
    console = Console()
    if not console.is_terminal:  # its default width is too narrow for the table, and print() can only lower it
        console = Console(width=TEXT_WIDTH)
    console.print(saved.table)
    if saved.serving is not None:
        console.print(saved.serving)
    for path in saved.figures:
        console.print(f"figure: {path} (and .pdf, .csv)", highlight=False, soft_wrap=True)
    console.print(f"table:  {folder / 'table.csv'}", highlight=False, soft_wrap=True)
    heading = title_of(runs[0])
    write_page(split_sections(runs, points, saved.frame, heading, missing, folder), heading, folder / PAGE)
    console.print(f"report: {folder / PAGE}", highlight=False, soft_wrap=True)
    if saved.failed:
        raise ValueError("; ".join(f"figure {name} {reason}" for name, reason in saved.failed.items()))
    return saved


def report_sweep(sweep: Sweep) -> Saved | None:
    """Report what is finished of a sweep, if anything is, and name what is not."""
    saved = None
    if sweep.runs:
        saved = report_runs(sweep.runs, sweep.points, sweep.experiment, sweep.folder, reasons(sweep))
    for run_id in sweep.missing:
        print(f"missing: {run_id} (start the same command again)")
    return saved
