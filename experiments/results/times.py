"""How long points take: estimated from runs of the same model and load that finished, and what is left of a sweep."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from experiments.point.point import Point
from results_schema.files import CONFIG, MANIFEST, SWEEP, SWEEP_DIR_VARIABLE
from results_schema.manifest import Status, read_manifest

#: So many of the newest runs are looked at: reading a run's files takes milliseconds.
_MAX_RUNS = 200
#: What decides how long a forward pass takes, beside the systems and their number.
_LOAD = ("backend", "world_size", "batch_size", "seq_len", "decode_tokens", "requests", "model", "hardware")


@dataclass(frozen=True)
class Times:
    """What finished runs tell of the next ones.

    Attributes:
        pass_s: by load, seconds per forward pass of one system, set-up included: the median over the runs.
    """

    pass_s: Mapping[str, float]

    def estimate_s(self, point: Point) -> float | None:
        """Return about how many seconds a point takes; None where no run of such a load has finished."""
        pass_s = self.pass_s.get(_load(point.config))
        return None if pass_s is None else pass_s * _num_passes(point.config)


def read_times(results_dir: Path) -> Times:
    """Read how long the newest finished runs below a folder took; what cannot be read is passed over."""
    seconds: dict[str, list[float]] = {}
    manifests = sorted(results_dir.glob(f"*/*/{MANIFEST}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in manifests[:_MAX_RUNS]:
        took_s = _took_s(path.parent)
        if took_s is None:
            continue
        try:
            config = yaml.load((path.parent / CONFIG).read_text(encoding="utf-8"), yaml.CSafeLoader)
            until = read_manifest(path.parent).get("until") or {}
            num_passes = _num_passes(config | {"rounds": until.get("rounds", config["rounds"])})
            seconds.setdefault(_load(config), []).append(took_s / num_passes)
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue
    return Times({load: statistics.median(found) for load, found in seconds.items()})


def sweep_left() -> str:
    """Say how far the sweep that is being run has come, as in ``2 of 5 points done, about 3 min left``.

    Empty where there is no sweep, nothing of it is left, or its points run side by side as SLURM's tasks.
    """
    folder = os.environ.get(SWEEP_DIR_VARIABLE)
    if not folder or os.environ.get("SLURM_ARRAY_TASK_ID"):
        return ""
    run_ids = json.loads(Path(folder, SWEEP).read_text(encoding="utf-8"))["run_ids"]
    took = [s for run_id in run_ids if (s := _took_s(Path(folder).parent.parent / run_id)) is not None]
    num_left = len(run_ids) - len(took)
    if not took or not num_left:
        return ""
    left_s = statistics.mean(took) * num_left
    return f"{len(took)} of {len(run_ids)} points done, about {duration(left_s)} left"


def duration(seconds: float) -> str:
    """Return a duration for people: ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _took_s(folder: Path) -> float | None:
    """Return how long a finished run took, its share where it was measured with others; None where there is none."""
    try:
        manifest = read_manifest(folder)
        if manifest["status"] != Status.FINISHED:
            return None
        start, end = (datetime.fromisoformat(manifest[name]) for name in ("started_at", "ended_at"))
        together = max(1, len((manifest.get("group") or {}).get("run_ids", ())))
    except (ValueError, KeyError, TypeError):
        return None
    return max(0.5, (end - start).total_seconds()) / together  # written in whole seconds


def _load(config: Mapping[str, Any]) -> str:
    return json.dumps([config[name] for name in _LOAD], sort_keys=True)


def _num_passes(config: Mapping[str, Any]) -> int:
    """Return how many forward passes the systems do: for the check, warm-up and measured rounds."""
    return len(config["systems"]) * (1 + int(config["warmup_rounds"]) + int(config["rounds"]))
