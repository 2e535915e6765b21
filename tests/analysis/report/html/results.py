"""Results of which a reader of the report need not be warned, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.data.load import load_run, load_sweep
from analysis.data.summary import summarise
from analysis.present.table import skew_points, summary_frame
from analysis.report.html.section import Section, split_sections
from tests.synthetic import change_manifest, write_run

#: Five quiet rounds: HarMoEny takes 0.8 of static EP's time in every one of them.
QUIET_S = {"static_ep": [1.0, 1.01, 0.99, 1.0, 1.02], "harmoeny": [0.8, 0.808, 0.792, 0.8, 0.816]}
GOOD = {
    "git": {"revision": "0123456789abcdef", "dirty": False},
    "packages": {"torch": "2.13.0"},
    "host": {"name": "here", "num_cores": 2},
    "threads_per_rank": 1,
    "ended_at": "2026-01-01T00:00:00+00:00",
}


def good_run(
    folder: Path, latency_s: Mapping[str, Sequence[float]] = QUIET_S, *, skew: float = 0.9, **changes: Any
) -> Path:
    write_run(folder, latency_s=latency_s, skew=skew)
    checks = {
        name: {"relative_error": 2e-7, "tolerance": 1e-4, "kept_share": 1.0, "passed": True} for name in latency_s
    }
    change_manifest(folder, **(GOOD | {"checks": checks} | changes))
    return folder


def change_tables(folder: Path, **columns: str) -> None:
    import pandas as pd

    for name in ("layers", "iterations"):
        path = folder / f"{name}.parquet"
        pd.read_parquet(path).assign(**columns).to_parquet(path, index=False)


def write_sweep_of(results: Path, points: Sequence[Mapping[str, Any]], run_ids: Sequence[str]) -> Path:
    folder = results / "sweeps" / "fedcba98"
    folder.mkdir(parents=True)
    content = {
        "sweep_id": folder.name,
        "experiment": "a_sweep",
        "axes": list(points[0]),
        "run_ids": list(run_ids),
        "values": [dict(point) for point in points],
    }
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


def section_of(folder: Path) -> Section:
    """The only section of a run or of a sweep."""
    (section,) = sections_of(folder)
    return section


def sections_of(folder: Path) -> list[Section]:
    if (folder / "sweep.json").exists():
        sweep = load_sweep(folder)
        runs, points, missing = sweep.runs, sweep.points, sweep.missing
    else:
        runs, missing = [load_run(folder)], []
        points = skew_points(runs)
    frame = summary_frame(runs, [summarise(run) for run in runs], points)
    return split_sections(runs, points, frame, "title", missing)
