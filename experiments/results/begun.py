"""The beginning of a run: its folder is held, nothing of an earlier attempt is left, and the machine knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from experiments.console import say
from experiments.point.point import Point
from experiments.results.kept import is_kept
from experiments.results.lock import hold
from experiments.results.neighbours import registered
from experiments.results.run_folder import RunFolder
from experiments.results.sweep import point_title


@contextmanager
def begun(point: Point, *, wait: bool) -> Iterator[RunFolder | None]:
    """Begin a run as the only process that does; it is held until the block ends.

    Args:
        point: the point.
        wait: wait for another process that measures the same.

    Yields:
        The run's folder; None where another process has finished the run meanwhile.

    Raises:
        RunBusyError: another process measures the same, and ``wait`` is false.
        OSError: the folder cannot be written.
    """
    title = point_title(point.run_id)
    with hold(point.folder, title, wait=wait):
        if is_kept(point):
            yield None
            return
        with registered(f"{point.options.experiment}/{point.run_id}") as neighbours:
            for other in neighbours.at_start if neighbours else ():
                say(
                    f"{title}: {other['run']} (process {other['pid']}) is being measured on this machine too; "
                    "the results of both will say so"
                )
            folder = RunFolder(point.folder, neighbours)
            for path in folder.damaged:
                say(f"{title}: {path} is damaged, and the point is measured again")
            folder.begin(point)
            yield folder
