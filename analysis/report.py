"""Table and figures of a sweep or a single run, printed and saved beside the results."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from analysis.figures.base import FigureData, draw_all
from analysis.load import Run, Sweep
from analysis.summary import summarise
from analysis.table import as_text, build_table, caption, summary_frame


def report_runs(runs: Sequence[Run], axes: Sequence[str], title: str, folder: Path) -> None:
    """Print the table, and save table and figures in ``folder``."""
    frame = summary_frame(runs, [summarise(run) for run in runs], axes)
    table = build_table(frame, axes, title)
    console = Console()
    # Where nobody watches, the width is the terminal's default, too narrow for the table.
    console.print(table) if console.is_terminal else print(as_text(table), end="")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "table.txt", as_text(table))
    _write(folder / "table.csv", frame.to_csv(index=False))
    model = runs[0].manifest["model"]
    models = ", ".join(sorted({run.manifest["model"]["name"] for run in runs}))
    text = (
        f"{caption(frame)}, bars: 95 % bootstrap intervals. Model {models}: "
        f"{model['num_experts']} experts x {model['num_moe_layers']} MoE layers, top-{model['top_k']}; data set "
        f"{runs[0].manifest['dataset']['name']}."
    )
    drawn, _ = draw_all(FigureData(frame, list(axes), text), folder / "figures")
    for path in drawn:
        console.print(f"figure: {path} (and .pdf, .csv)", highlight=False, soft_wrap=True)
    console.print(f"table:  {folder / 'table.csv'}", highlight=False, soft_wrap=True)


def report_sweep(sweep: Sweep) -> None:
    """Report what is finished of a sweep, and name what is not."""
    if sweep.runs:
        report_runs(sweep.runs, sweep.axes, sweep.experiment, sweep.folder)
    for run_id in sweep.missing:
        print(f"missing: {run_id} (start the same command again)")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
