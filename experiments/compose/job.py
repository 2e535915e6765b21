"""One point as Hydra's task: skip it if it is finished, else measure its group, and report failure in one line."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import NoReturn

from omegaconf import DictConfig

from experiments.compose.backends import backend_of
from experiments.compose.groups import is_measured, left_of_group, note_measured
from experiments.compose.load import load_point
from experiments.compose.messages import explain, one_line
from experiments.console import say, tidy_terminal
from experiments.launch.environment import is_main_rank, joined_world_size
from experiments.launch.interrupt import interruptible
from experiments.launch.joined import run_joined
from experiments.launch.local import InterruptedRun
from experiments.launch.muster import tell_others
from experiments.point.point import Point
from experiments.results.begun import begun
from experiments.results.kept import is_kept, remarks, replaced
from experiments.results.run_folder import RunError, RunFolder
from experiments.results.sweep import point_title
from experiments.results.times import sweep_left
from experiments.routers.base import SkippedPoint
from experiments.text.prepare import prepare_point
from results_schema.files import SWEEP_DIR_VARIABLE


def run_point(config: DictConfig) -> str | None:
    """Run one point, and what else of its group is missing, unless its folder holds a finished run.

    Returns:
        The run's folder, or None on ranks other than 0.

    Raises:
        SystemExit: the point failed (1), its configuration is wrong (2), or a signal ended it (128 + its number);
            nothing else of a sweep runs then.
    """
    try:
        point = load_point(config)
        if point.routing_remark and is_main_rank() and not os.environ.get(SWEEP_DIR_VARIABLE):  # a sweep said it before
            say(point.routing_remark)
        measured = _run(point)
    except SkippedPoint as reason:
        say(f"skipped: {reason}")
        return None
    except ValueError as error:
        fail(error, 2)
    except RunError as error:
        fail(error, 1)
    except OSError as error:
        fail(explain(error), 1)
    except InterruptedRun as error:
        leave_interrupted(error.signal)
    if not is_main_rank():
        return None
    title, folder = point_title(point.run_id), RunFolder(point.folder)
    if not is_measured(point):
        kept = f"{title}: finished before, kept ({folder.path})"
        say(f"{kept}{remarks(point)}; force=true measures it again, tag= beside it")
        for name, cause in folder.failed_systems.items():
            say(f"error: {title}: {name} failed its check: {cause}")
    elif not folder.is_finished:
        say(f"error: {title}: no system passed its check; there is no result")
    if measured and (left := sweep_left()):
        say(f"{point.options.experiment}: {left}")
    return str(folder.path)


def _run(point: Point) -> list[Point]:
    """Measure what is missing of a point's group, unless the point itself is kept; return what was measured."""
    measured: list[Point] = []
    if is_measured(point):
        return measured
    if joined_world_size() is not None:
        measured = run_joined(left_of_group(point))
    elif not is_kept(point):
        measured = _run_here([other for other in left_of_group(point) if not is_kept(other)])
    note_measured(measured)
    return measured


def _run_here(points: Sequence[Point]) -> list[Point]:
    for point in points:
        if why := replaced(point):
            say(f"{point_title(point.run_id)}: measured again {why}")
    first = points[0]
    tokens = prepare_point(first) if first.reads_text else None
    with interruptible(), begun(points, wait=True) as runs:
        if not runs:
            return []
        try:
            backend_of(first).run(runs, tokens)
        except (RunError, InterruptedRun, OSError) as error:
            tidy_terminal()
            for run in runs:
                run.folder.fail(str(error))
            raise
        return [run.point for run in runs]


def fail(error: object, status: int) -> NoReturn:
    """Print one clear error and end the process with ``status``; other ranks of a job do not wait for this one."""
    line = one_line(error)
    say(f"error: {line}")
    tell_others(line)
    raise SystemExit(status)


def leave_interrupted(number: signal.Signals) -> NoReturn:
    """End the process because a signal asked for it, with the status that a shell gives to that."""
    say("interrupted: all ranks were stopped; the same command again resumes")
    raise SystemExit(128 + number)
