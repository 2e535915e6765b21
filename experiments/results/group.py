"""Which points were measured together: what their manifests say of that, and what the group is called."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from typing import Any

from experiments.point.group import common_config
from experiments.point.point import Point
from experiments.results.sweep import point_title


def new_group(points: Sequence[Point]) -> dict[str, Any]:
    """Return what the manifests of points that are measured together now say of their group.

    Its id belongs to this one measurement, so that nobody pairs rounds of different ones. Simulations share one
    whenever they run, as nothing drifts between them.
    """
    first = points[0]
    known = hashlib.sha256(json.dumps(common_config(first), sort_keys=True).encode()).hexdigest()[:16]
    return {
        "id": known if first.simulated else secrets.token_hex(8),
        "run_ids": [point.run_id for point in points],
        "mirrored": not first.simulated,
    }


def group_title(points: Sequence[Point]) -> str:
    """Return what a group is called in messages: its point, or how many points of which experiment."""
    if len(points) == 1:
        return point_title(points[0].run_id)
    return f"{points[0].options.experiment}, {len(points)} points"
