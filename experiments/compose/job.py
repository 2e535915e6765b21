"""One point as Hydra's task: skip it if it is finished, else prepare, launch, and report failure in one line."""

from __future__ import annotations

import signal
from typing import NoReturn

from omegaconf import DictConfig

from experiments.compose.checks import load_point
from experiments.console import say, tidy_terminal
from experiments.launch.environment import is_main_rank, joined_world_size
from experiments.launch.joined import run_joined
from experiments.launch.local import InterruptedRun, RanksError, launch
from experiments.measure.check import CheckError
from experiments.point.point import Point
from experiments.results.manifest import forget_unfinished, is_done, mark_failed, new_manifest, write_manifest
from experiments.results.sweep import point_title
from experiments.routers.base import SkippedPoint
from experiments.simulator.backend import run_simulated
from experiments.simulator.device_memory import OutOfMemoryError
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile


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
        done = _run(point)
    except SkippedPoint as reason:
        say(f"skipped: {reason}")
        return None
    except ValueError as error:
        fail(error, 2)
    except (RanksError, CheckError, OutOfMemoryError) as error:
        fail(error, 1)
    except InterruptedRun as error:
        leave_interrupted(error.signal)
    if not done and is_main_rank():
        title = point_title(point.run_id)
        say(f"{title}: finished before, kept ({point.folder}); delete the folder or set tag= to measure it again")
    return str(point.folder) if is_main_rank() else None


def _run(point: Point) -> bool:
    if joined_world_size() is not None:
        return run_joined(point, point.folder)
    if is_done(point):
        return False
    simulated = point["backend"] == "simulator"
    tokens = None
    if point.reads_text:
        tokens = prepare_point(point)
        tokens.check(point["seq_len"])
    point.folder.mkdir(parents=True, exist_ok=True)
    forget_unfinished(point.folder)
    write_manifest(point.folder, new_manifest(point))
    try:
        if simulated:
            _simulate(point, tokens)
        else:
            assert tokens is not None, "real ranks read text"
            launch(point, tokens, point.folder)
    except (RanksError, InterruptedRun, OutOfMemoryError) as error:
        tidy_terminal()
        mark_failed(point.folder, str(error))
        raise
    return True


def _simulate(point: Point, tokens: TokenFile | None) -> None:
    try:
        out_of_memory = run_simulated(point, tokens, point.folder)
    except KeyboardInterrupt as error:
        raise InterruptedRun(signal.SIGINT) from error
    for name, reason in out_of_memory.items():
        say(f"{point_title(point.run_id)}: {name} does not fit: {reason}")


def fail(error: object, status: int) -> NoReturn:
    """Print one clear error and end the process with ``status``."""
    say(f"error: {error}")
    raise SystemExit(status)


def leave_interrupted(number: signal.Signals) -> NoReturn:
    """End the process because a signal asked for it, with the status that a shell gives to that."""
    say("interrupted: all ranks were stopped; the same command again resumes")
    raise SystemExit(128 + number)
