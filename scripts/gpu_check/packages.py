"""The packages that a check needs; it imports none of them itself, so that it can say what is missing."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent.parent
#: Only asked for where it is used: W&B is switched off here, submitit starts SLURM jobs.
_NOT_NEEDED = ("wandb", "submitit")


def needed_packages() -> list[Requirement]:
    """Return what a check imports, with the bounds of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [Requirement(r) for r in project["dependencies"] + project["optional-dependencies"]["test"]]
    return [r for r in needed if r.name not in _NOT_NEEDED]


def missing_packages() -> list[str]:
    """Return the requirements that this Python does not meet, as pip takes them."""
    missing = []
    for requirement in needed_packages():
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                missing.append(str(requirement))
        except PackageNotFoundError:
            missing.append(str(requirement))
    return missing
