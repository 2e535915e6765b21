"""Writes the page of a folder of results: a section for every sweep and every single run in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.data.load import Run, Sweep, load_run, load_sweep
from analysis.data.results import find_results
from analysis.data.summary import summarise
from analysis.present.table import skew_points, summary_frame
from analysis.report.html.page import Note, render_page
from analysis.report.html.section import Section, split_sections
from results_schema.atomic import write_text
from results_schema.files import MANIFEST, SWEEP
from results_schema.manifest import read_manifest

PAGE = "report.html"
Points = Sequence[Mapping[str, Any]]
Frame = Callable[[Sequence[Run], Points], pd.DataFrame]


def write_report(folder: Path, target: Path | None = None) -> Path:
    """Write the page of a run's folder, a sweep's folder, or a folder that holds several of them.

    Args:
        folder: where the results are.
        target: the page; ``report.html`` in the folder unless given.

    Returns:
        The page.

    Raises:
        ValueError: there is no finished run, or one is damaged.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: must be a folder of results")
    notes: list[Note] = []
    if (folder / MANIFEST).exists():
        sections = _run_sections(load_run(folder))
    elif (folder / SWEEP).exists():
        sections = _sweep_sections(load_sweep(folder))
    else:
        sections, notes = _all_sections(folder)
    if not sections:
        raise ValueError(f"{folder}: no finished run; python run.py experiment=skew_sweep makes some")
    title = sections[0].title if len(sections) == 1 else folder.resolve().name
    target = target or folder / PAGE
    write_page(sections, title, target, notes)
    return target


def _all_sections(folder: Path) -> tuple[list[Section], list[Note]]:
    """Return a section per sweep, the latest first, then one per run that is in none, and what has no section."""
    results = find_results(folder)
    if results.unreadable and not results.sweeps and not results.single_runs:
        raise ValueError(results.unreadable[0])
    summaries: dict[Path, dict[str, Any]] = {}

    def frame(of: Sequence[Run], points: Points) -> pd.DataFrame:
        for run in of:  # several sweeps may share it
            if run.folder.resolve() not in summaries:
                summaries[run.folder.resolve()] = summarise(run)
        return summary_frame(of, [summaries[run.folder.resolve()] for run in of], points)

    by_sweep = [_sweep_sections(sweep, frame) for sweep in results.sweeps]
    by_run = [_run_sections(run, frame) for run in results.single_runs]
    groups = [group for parts in (by_sweep, by_run) for group in sorted(parts, key=_ended, reverse=True)]
    notes = [
        Note(f"{what}, hence not shown: {len(items)}", items)
        for what, items in (
            ("Runs that did not come to an end", results.unfinished),
            ("Results that cannot be read", results.unreadable),
        )
        if items
    ]
    return [section for group in groups for section in group], notes


def _sweep_sections(sweep: Sweep, frame: Frame | None = None) -> list[Section]:
    """Return a sweep's sections; none if no run is finished."""
    if not sweep.runs:
        return []
    title = title_of(sweep.runs[0])
    rows = (frame or _frame)(sweep.runs, sweep.points)
    return split_sections(sweep.runs, sweep.points, rows, title, reasons(sweep), sweep.folder)


def _run_sections(run: Run, frame: Frame | None = None) -> list[Section]:
    points = skew_points([run])
    return split_sections([run], points, (frame or _frame)([run], points), title_of(run), folder=run.folder)


def _frame(runs: Sequence[Run], points: Points) -> pd.DataFrame:
    return summary_frame(runs, [summarise(run) for run in runs], points)


def title_of(run: Run) -> str:
    """Name a run's or its sweep's section: the experiment, and the tag if it has one."""
    tag = run.config.get("tag")
    return f"{run.manifest['experiment']} ({tag})" if tag else str(run.manifest["experiment"])


def reasons(sweep: Sweep) -> list[str]:
    """Say of every unfinished run what is known."""
    reasons = []
    for run_id in sweep.missing:
        try:
            manifest = read_manifest(sweep.folder.parent.parent / run_id)
        except ValueError:
            manifest = {"status": "not started"}
        error = f": {manifest['error']}" if manifest.get("error") else ""
        reasons.append(f"{run_id} ({manifest['status']}{error})")
    return reasons


def _ended(sections: Sequence[Section]) -> str:
    return max(str(run.manifest.get("ended_at", "")) for section in sections for run in section.runs)


def write_page(sections: Sequence[Section], title: str, target: Path, notes: Sequence[Note] = ()) -> None:
    """Render sections and store the page in one step."""
    created = f"Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by python -m analysis.report."
    write_text(target, render_page(sections, title, created, notes))
