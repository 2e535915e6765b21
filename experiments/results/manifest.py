"""What a run's manifest says: what ran, where and on what. The run's folder (run_folder.py) writes it."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import socket
import subprocess
from dataclasses import fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from experiments.point.point import Point
from harmoeny.cores import usable_cores
from harmoeny.policy import Policy
from harmoeny.runtime.device import Device, gpu_names
from results_schema.manifest import Status

_PACKAGES = ("torch", "transformers", "numpy", "numba", "pandas", "hydra-core", "tokenizers", "deepspeed")


def new_manifest(point: Point) -> dict[str, Any]:
    """Describe a run that starts now."""
    return {
        "run_id": point.run_id,
        "experiment": point.options.experiment,
        "status": Status.RUNNING,
        "started_at": now(),
        "ended_at": None,
        **environment(),
        "sources": point.sources(),
        "seed": point.options.seed,
        "world_size": point.options.world_size,
        "point": point.labels(),
        "systems": {
            name: {
                "policy": policy.name,
                "description": policy.description,
                "exact": policy.exact,
                "baseline": policy.baseline,
                "bound": policy.bound,
                "knows": sorted(policy.knows),
                "behaviour": behaviour_of(policy),
                "options": options_of(point, name, policy),
            }
            for name, policy in point.systems.items()
        },
    }


def behaviour_of(policy: Policy) -> str:
    """Return a digest of what a policy does, whatever it is called: its code by name and where it stands, its options.

    Two systems of the same digest are one and the same under two names.
    """
    options = {field.name: repr(getattr(policy, field.name)) for field in fields(policy) if field.init}
    code = {
        name: _code_name(inspect.getattr_static(type(policy), name))
        for name in dir(type(policy))
        if not name.startswith("__") and name not in ("name", "description", "_abc_impl", *options)
    }
    return hashlib.sha256(json.dumps([options, code], sort_keys=True).encode()).hexdigest()[:16]


def _code_name(member: object) -> str:
    """Name a function, a property or another member of a class by what it is."""
    inner = (getattr(member, name, None) for name in ("fget", "func", "__func__", "__wrapped__"))
    function = next((found for found in inner if found is not None), member)
    if inspect.isfunction(function):
        return f"{function.__module__}.{function.__qualname__}"
    return repr(sorted(member) if isinstance(member, frozenset) else member)


def environment() -> dict[str, dict[str, Any]]:
    """Return what is noted of the code, the packages and the machine."""
    return {"git": git_state(), "packages": _packages(), "host": _host()}


def options_of(point: Point, name: str, policy: Policy) -> dict[str, Any]:
    """Return the values of a system's options, with what calibration filled in.

    Those that were configured; all of them where code added the policy to the point.
    """
    names = point.options.systems.get(name) or [field.name for field in fields(policy)]
    return {option: getattr(policy, option) for option in names if not option.startswith("_")}


def model_fields(
    point: Point, *, num_moe_layers: int, num_experts: int, top_k: int, expert_bytes: int, store_bytes: int
) -> dict[str, Any]:
    """Describe the model that ran.

    Args:
        point: names it.
        num_moe_layers: MoE layers.
        num_experts: experts per MoE layer.
        top_k: experts per token.
        expert_bytes: of the weights of one expert.
        store_bytes: of the weights of all experts of all layers.
    """
    return {
        "name": point.model.name,
        "num_moe_layers": num_moe_layers,
        "num_experts": num_experts,
        "top_k": top_k,
        "expert_bytes": expert_bytes,
        "store_bytes": store_bytes,
    }


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_state() -> dict[str, Any]:
    """Return the project's ``revision`` and whether files differ from it (``dirty``); None where git cannot tell."""
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
    cores = usable_cores()
    return {
        "name": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": Device.of(torch.device("cpu")).name,
        "num_cores": cores.number,
        "cpu_quota": cores.quota,
        "cores_limited_by": cores.limited_by,
        "gpus": gpu_names(),
    }
