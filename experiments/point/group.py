"""Points that differ in nothing but their routing: the same ranks measure them together, round by round."""

from __future__ import annotations

import json
from collections.abc import Sequence

from experiments.point.point import Point

#: What the points of a group may differ in: the routing, and the file that it is recorded in.
_OWN = ("router", "trace")


def grouped(points: Sequence[Point]) -> list[list[Point]]:
    """Divide points into groups, each as long as it can be; groups and their points keep the order.

    A simulation is a group of its own: no machine drifts between two of them.
    """
    groups: dict[str, list[Point]] = {}
    for point in points:
        key = point.run_id if point.simulated else json.dumps(common_config(point), sort_keys=True)
        groups.setdefault(key, []).append(point)
    return list(groups.values())


def common_config(point: Point) -> dict[str, object]:
    """Return the configuration that all points of a group share."""
    return {name: value for name, value in point.config.items() if name not in _OWN}
