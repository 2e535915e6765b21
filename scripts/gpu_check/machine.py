"""What a check ran on."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from experiments.results.manifest import git_state
from harmoeny.runtime.device import Device


def describe_machine(device_type: str) -> dict[str, Any]:
    """Return the device and the versions of what ran on it."""
    device = torch.device(device_type)
    found: dict[str, Any] = {
        "device": Device.of(device).name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        **git_state(),
        "mps": shutil.which("nvidia-cuda-mps-control") is not None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "compute_capability": f"{properties.major}.{properties.minor}",
            "num_sms": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "triton": _version("triton"),
        }
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """Return the first line that a command prints, or None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603  (our own)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().partition("\n")[0] or None
