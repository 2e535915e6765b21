"""How long policies took to plan, kept by what they planned: a simulation that is repeated gives the same figures."""

from __future__ import annotations

import hashlib
import json
import pickle
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.console import say
from experiments.files import cache_dir, intact_content, keep
from experiments.point.source import component_digest
from harmoeny.placement import IntArray, Placement
from harmoeny.policy import Policy

#: Of one policy and its options; the oldest go first.
_MOST_KEPT = 100_000


class PlanTimes:
    """The times of one policy with one choice of options on this machine."""

    def __init__(self, path: Path | None = None) -> None:
        """Read what is kept.

        Args:
            path: the file; None, or a file that cannot be read: nothing is known yet. None is never written either.
        """
        self._path = path
        self._known: dict[str, float] = _read(path) if path is not None else {}
        self._new = False

    @classmethod
    def of(cls, policy: Policy) -> PlanTimes:
        """Return those of a policy as it is now, with all that it has been fitted to."""
        identity = hashlib.sha256(component_digest(policy, Policy).encode())
        identity.update(pickle.dumps(policy))
        identity.update(f"{platform.node()} {platform.processor()} {np.__version__}".encode())
        try:
            return cls(cache_dir() / f"plan-times-{policy.name}-{identity.hexdigest()[:16]}.json")
        except ValueError as error:
            say(f"plan times are not kept: {error}")
            return cls()

    def seconds(self, counts: IntArray, placement: Placement, measure: Callable[[], float]) -> float:
        """Return how long a plan takes.

        Args:
            counts: int64 ``[world_size, num_experts]``.
            placement: the present residency.
            measure: gives the time in seconds where it is not known yet.
        """
        digest = hashlib.sha256(np.ascontiguousarray(counts).data)
        digest.update(np.ascontiguousarray(placement.resident).data)
        key = f"{len(counts)}x{counts.shape[1]} {digest.hexdigest()[:16]}"
        if key not in self._known:
            self._known[key] = measure()
            self._new = True
        return self._known[key]

    def save(self) -> None:
        """Keep what is new; where that is impossible it is said, as only the next simulation will differ."""
        if self._path is None or not self._new:
            return
        newest = dict(list(self._known.items())[-_MOST_KEPT:])
        try:
            keep(self._path, json.dumps(newest).encode())
        except ValueError as error:
            say(f"plan times are not kept: {error}")


def _read(path: Path) -> dict[str, float]:
    """Return the kept times; what is torn or damaged counts as nothing."""
    content = intact_content(path)
    known: dict[str, float] = json.loads(content) if content is not None else {}
    return known
