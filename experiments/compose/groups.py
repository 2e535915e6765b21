"""The groups of the sweep that this process runs: the first point of a group that is run takes the others with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.point.group import grouped
from experiments.point.point import Point


class _State:
    """Of this process, as Hydra runs the points of a sweep one by one.

    Attributes:
        groups: by a point's folder, its group.
        measured: folders of what this process has measured.
    """

    groups: dict[Path, list[Point]] = {}  # noqa: RUF012  (one per process)
    measured: set[Path] = set()  # noqa: RUF012


def announce(points: Sequence[Point]) -> None:
    """Say which points this process will be asked to run."""
    _State.groups = {point.folder: group for group in grouped(points) for point in group}


def left_of_group(point: Point) -> list[Point]:
    """Return a point with those of its group, without what this process has measured already."""
    return [other for other in _State.groups.get(point.folder, [point]) if not is_measured(other)]


def note_measured(points: Sequence[Point]) -> None:
    """Remember what was measured now, even where it is asked for by force."""
    _State.measured |= {point.folder for point in points}


def is_measured(point: Point) -> bool:
    """Tell whether this process has measured a point, maybe together with an earlier one of its group."""
    return point.folder in _State.measured
