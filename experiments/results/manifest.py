"""manifest.json: what ran, where, on what, and whether it came to its end."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from experiments.point.point import Point
from harmoeny.policy import Policy
from results_schema.atomic import write_text

_PACKAGES = ("torch", "transformers", "numpy", "numba", "pandas", "hydra-core", "tokenizers", "deepspeed")


def new_manifest(point: Point) -> dict[str, Any]:
    """Describe a run that starts now."""
    return {
        "run_id": point.run_id,
        "experiment": point["experiment"],
        "status": "running",
        "started_at": now(),
        "ended_at": None,
        "git": _git(),
        "packages": _packages(),
        "host": _host(),
        "seed": point["seed"],
        "world_size": point["world_size"],
        "point": point.labels(),
        "systems": {
            name: {
                "policy": policy.name,
                "description": policy.description,
                "exact": policy.exact,
                "baseline": policy.baseline,
                "bound": policy.bound,
                "options": options_of(point, name, policy),
            }
            for name, policy in point.systems.items()
        },
    }


def options_of(point: Point, name: str, policy: Policy) -> dict[str, Any]:
    """Return the values of a system's configured options, with what calibration filled in."""
    return {option: getattr(policy, option) for option in point["systems"][name] if not option.startswith("_")}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest in one step, so that a reader sees the old one or the new one."""
    write_text(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a run's manifest; empty where there is none or it is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def mark_failed(folder: Path, reason: str) -> None:
    """Say in the manifest why the run failed; a run that has none yet, or has ended, is left as it is."""
    manifest = read_manifest(folder)
    if manifest.get("status") == "running":
        write_manifest(folder, manifest | {"status": "failed", "ended_at": now(), "error": reason})


def is_finished(folder: Path) -> bool:
    """Tell whether a folder holds a run that came to its end; a damaged manifest counts as unfinished."""
    return bool(read_manifest(folder).get("status") == "finished")


def forget_unfinished(folder: Path) -> None:
    """Remove what an unfinished run left, so that its numbers never mix with the new ones."""
    for name in ("layers", "iterations", "routing", "requests", "decode"):
        (folder / f"{name}.parquet").unlink(missing_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    for temporary in folder.glob(".*"):
        temporary.unlink()


def is_done(point: Point) -> bool:
    """Tell whether nothing of a point is left to do: its run is finished and the trace that it records is there."""
    record = point["trace"]["record"]
    return is_finished(point.folder) and (record is None or Path(record).exists())


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_name(device: torch.device) -> str:
    """Return the name of the processor or GPU that executes the experts."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return "CPU " + line.split(":", 1)[1].strip()
    return "CPU " + (platform.processor() or platform.machine())


def _git() -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]

    def ask(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(  # noqa: S603  (fixed arguments)
                ["git", *arguments],  # noqa: S607
                cwd=root,
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip()

    status = ask("status", "--porcelain", "--untracked-files=no")
    return {"revision": ask("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _host() -> dict[str, Any]:
    return {
        "name": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": device_name(torch.device("cpu")),
        "num_cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
