"""The fields of ``manifest.json`` and ``sweep.json``, and whether a run came to its end (docs/metrics.md)."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from results_schema.files import MANIFEST


class Status(StrEnum):
    """How far a run came; only a finished one is ever reported."""

    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"


#: ``backend`` of a run that no rank measured: its numbers are predicted for the hardware that is described.
SIMULATOR = "simulator"

#: Options that say where results go or what is done with them, and change no measurement.
NOT_MEASURED = ("experiment", "results_dir", "wandb", "timeout_s", "trace", "force", "dry_run", "slo")

#: What the manifest of every finished run says; the analysis relies on it.
REQUIRED_FIELDS = (
    "run_id", "experiment", "status", "backend", "device", "scope", "world_size", "point", "systems", "model",
    "dataset",
)  # fmt: skip
#: What else it may say.
FURTHER_FIELDS = (
    "started_at", "ended_at", "error", "git", "packages", "host", "sources", "inputs", "seed",
    "threads_per_rank", "exchange", "calibration", "checks", "beside", "hardware_source", "out_of_memory",
    "failed_systems", "checksums", "group", "yardstick", "until",
)  # fmt: skip
#: What it says of every system under ``systems``: ``fit`` and ``kernel`` are a real run's, ``threshold`` a simulated
#: one's.
SYSTEM_FIELDS = (
    "policy", "description", "exact", "baseline", "bound", "knows", "options", "device_expert_bytes", "fit", "kernel",
    "threshold", "behaviour",
)  # fmt: skip
MANIFEST_FIELDS = (*REQUIRED_FIELDS, *FURTHER_FIELDS)

#: All that ``sweep.json`` says; ``values`` has for every one of ``run_ids`` its values of the options in ``axes``.
SWEEP_FIELDS = ("sweep_id", "experiment", "axes", "run_ids", "values")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a run's manifest.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no readable {MANIFEST} ({error})") from error
    if not isinstance(manifest, dict) or "status" not in manifest:
        raise ValueError(f"{folder}: {MANIFEST} has no status")
    return manifest


def is_finished(folder: Path) -> bool:
    """Tell whether a run came to its end; one with a damaged manifest did not, and its sweep runs it again."""
    try:
        return bool(read_manifest(folder)["status"] == Status.FINISHED)
    except ValueError:
        return False
