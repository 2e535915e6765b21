"""A sweep as it is written down before its first point runs, and what a point is called within it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.point.point import Point
from results_schema.atomic import write_text
from results_schema.files import SWEEP, SWEEP_DIR_VARIABLE, SWEEPS


def sweep_folder(points: Sequence[Point], axes: Sequence[str]) -> Path:
    """Return the folder of a sweep; its name is a digest of the swept options and the points."""
    identity = [list(axes), [point.run_id for point in points]]
    sweep_id = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:8]
    options = points[0].options
    return Path(options.results_dir, options.experiment, SWEEPS, sweep_id)


def write_sweep(folder: Path, points: Sequence[Point], axes: Sequence[str], values: Sequence[dict[str, Any]]) -> None:
    """Write down a sweep.

    Args:
        folder: its :func:`sweep_folder`.
        points: its points, each once.
        axes: names of the swept options.
        values: by point, the values of these options.
    """
    content = {
        "sweep_id": folder.name,
        "experiment": points[0].options.experiment,
        "axes": axes,
        "run_ids": [point.run_id for point in points],
        "values": values,
    }
    write_text(folder / SWEEP, json.dumps(content, indent=2) + "\n")


def point_title(run_id: str) -> str:
    """Return the values that the sweep gave a point and its number, as in ``skew=0.9 (3 of 3)``; else the run's id."""
    folder = os.environ.get(SWEEP_DIR_VARIABLE)
    if folder is None:
        return run_id
    sweep = json.loads(Path(folder, SWEEP).read_text(encoding="utf-8"))
    if run_id not in sweep["run_ids"] or len(sweep["run_ids"]) == 1:
        return run_id
    index = sweep["run_ids"].index(run_id)
    values = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in sweep["values"][index].items())
    return f"{values or run_id} ({index + 1} of {len(sweep['run_ids'])})"
