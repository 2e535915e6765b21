"""What a point is called within the sweep that it belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path

#: Tells the report, which runs when the sweep has ended, and the ranks where the sweep was written down.
SWEEP_DIR_VARIABLE = "HARMOENY_SWEEP_DIR"


def point_title(run_id: str) -> str:
    """Return the values that the sweep gave a point and its number, as in ``skew=0.9 (3 of 3)``; else the run's id."""
    folder = os.environ.get(SWEEP_DIR_VARIABLE)
    if folder is None:
        return run_id
    sweep = json.loads(Path(folder, "sweep.json").read_text(encoding="utf-8"))
    if run_id not in sweep["run_ids"] or len(sweep["run_ids"]) == 1:
        return run_id
    index = sweep["run_ids"].index(run_id)
    values = ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in sweep["values"][index].items())
    return f"{values or run_id} ({index + 1} of {len(sweep['run_ids'])})"
