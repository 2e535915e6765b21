"""The beginning of runs: their folders are held, earlier attempts are gone, and the machine knows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from experiments.console import say
from experiments.point.point import Point
from experiments.results.group import group_title, new_group
from experiments.results.kept import is_kept
from experiments.results.lock import hold
from experiments.results.neighbours import registered
from experiments.results.run_folder import RunFolder
from experiments.results.sweep import point_title


@dataclass(frozen=True)
class BegunRun:
    """A run that has begun; it pickles, for the ranks that measure it.

    Attributes:
        point: what is run.
        folder: where its results go.
    """

    point: Point
    folder: RunFolder


@contextmanager
def begun(points: Sequence[Point], *, wait: bool) -> Iterator[list[BegunRun]]:
    """Begin the runs of a group as the only process that does; they are held until the block ends.

    Args:
        points: the group's.
        wait: wait for other processes that measure the same.

    Yields:
        The runs, in the order of the points, without those that another process has finished meanwhile.

    Raises:
        RunBusyError: another process measures one of them, and ``wait`` is false.
        OSError: a folder cannot be written.
    """
    with ExitStack() as held:
        todo = _hold_missing(points, held, wait=wait)
        if not todo:
            yield []
            return
        name = f"{todo[0].options.experiment}/{todo[0].run_id}"
        neighbours = held.enter_context(registered(name if len(todo) == 1 else f"{name} and {len(todo) - 1} more"))
        for other in neighbours.at_start if neighbours and not todo[0].simulated else ():
            say(
                f"{group_title(todo)}: {other['run']} (process {other['pid']}) is being measured on this machine too; "
                "the results of both will say so"
            )
        runs = [BegunRun(point, RunFolder(point.folder, neighbours)) for point in todo]
        group = new_group(todo)
        for run in runs:
            for path in run.folder.damaged:
                say(f"{point_title(run.point.run_id)}: {path} is damaged, and the point is measured again")
            run.folder.begin(run.point, group)
        yield runs


def _hold_missing(points: Sequence[Point], held: ExitStack, *, wait: bool) -> list[Point]:
    """Hold the folders of all points that are to be run, until ``held`` is closed."""
    todo = set()
    # By name, as in every process: two that hold what the other waits for would wait for ever.
    for point in sorted(points, key=lambda point: point.run_id):
        lock = ExitStack()
        lock.enter_context(hold(point.folder, point_title(point.run_id), wait=wait))
        if is_kept(point):
            lock.close()
        else:
            held.push(lock)
            todo.add(point.run_id)
    return [point for point in points if point.run_id in todo]
