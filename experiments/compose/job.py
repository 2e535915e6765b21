"""One point as Hydra's task: skip it if it is finished, else prepare, launch, and report failure in one line."""

from __future__ import annotations

import os
import signal
from typing import NoReturn

from omegaconf import DictConfig

from experiments.compose.backends import backend_of
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
    """Run one point, unless its folder holds a finished run.

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
        done = _run(point)
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
    if not done:
        kept = f"{title}: finished before, kept ({folder.path})"
        say(f"{kept}{remarks(point)}; force=true measures it again, tag= beside it")
        for name, cause in folder.failed_systems.items():
            say(f"error: {title}: {name} failed its check: {cause}")
    elif not folder.is_finished:
        say(f"error: {title}: no system passed its check; there is no result")
    if done and (left := sweep_left()):
        say(f"{point.options.experiment}: {left}")
    return str(folder.path)


def _run(point: Point) -> bool:
    """Run a point unless it is done; tell whether it was run."""
    if joined_world_size() is not None:
        return run_joined(point)
    if is_kept(point):
        return False
    if why := replaced(point):
        say(f"{point_title(point.run_id)}: measured again {why}")
    tokens = prepare_point(point) if point.reads_text else None
    with interruptible(), begun(point, wait=True) as folder:
        if folder is None:
            return False
        try:
            backend_of(point).run(point, tokens, folder)
        except (RunError, InterruptedRun, OSError) as error:
            tidy_terminal()
            folder.fail(str(error))
            raise
    return True


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
