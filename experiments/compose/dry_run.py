"""``dry_run=true``: what would be run, what is kept, and about how long it takes; nothing is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.point.group import grouped
from experiments.point.point import Point
from experiments.results.kept import is_kept, replaced
from experiments.results.times import Times, duration, read_times


def describe_runs(points: Sequence[Point], values: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines on all points, checked before, and their total time.

    Args:
        points: of one experiment.
        values: by point, the values of the swept options.
    """
    times = read_times(Path(points[0].options.results_dir))
    todo = [point for point in points if not is_kept(point)]
    lines = [
        f"{'to run' if point in todo else 'kept  '}  {_title(point, own)}: {len(point.systems)} systems x "
        f"{point.options.rounds} rounds" + (_to_run(point, times) if point in todo else f" ({point.folder})")
        for point, own in zip(points, values, strict=True)
    ]
    titles = {point.run_id: _title(point, own) for point, own in zip(points, values, strict=True)}
    lines += [
        f"together, interleaved by rounds: {'; '.join(titles[point.run_id] for point in group)}"
        for group in grouped(todo)
        if len(group) > 1
    ]
    number = "1 point" if len(points) == 1 else f"{len(points)} points"
    total = total_time(todo, times)
    return [*lines, f"{points[0].options.experiment}: {number}, {num_to_run(todo)}{f', {total}' if total else ''}"]


def num_to_run(todo: Sequence[Point]) -> str:
    """Say how many points are to be run, and in how many groups: ``3 to run together``, ``4 to run in 2 groups``."""
    number = len(grouped(todo))
    together = "" if number == len(todo) else " together" if number == 1 else f" in {number} groups"
    return f"{len(todo)} to run{together}"


def total_time(todo: Sequence[Point], times: Times) -> str:
    """Return about how long points take together; where some are not known, how many; empty: there are none."""
    known = [seconds for point in todo if (seconds := times.estimate_s(point)) is not None]
    if len(known) == len(todo):
        return f"about {duration(sum(known))}" if todo else ""
    reason = f"no run of such a model and load has finished in {todo[0].options.results_dir}"
    unknown = f"time unknown ({reason}; docs/experiments.md has those of the prepared experiments)"
    return f"about {duration(sum(known))} for {len(known)} of them, the others: {unknown}" if known else unknown


def _title(point: Point, values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or point.run_id


def _to_run(point: Point, times: Times) -> str:
    seconds, why = times.estimate_s(point), replaced(point)
    return f", {'time unknown' if seconds is None else f'about {duration(seconds)}'}{f', {why}' if why else ''}"
