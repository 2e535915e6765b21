"""Before anything runs: check every point of the sweep, and write down which runs belong to it."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.compose.dry_run import describe_runs, num_to_run, total_time
from experiments.compose.groups import announce
from experiments.compose.job import fail
from experiments.compose.load import load_point
from experiments.compose.messages import explain
from experiments.compose.processes import is_parallel
from experiments.compose.submitted import is_submitted
from experiments.compose.swept import leave_out_absent, parse_overrides, sweep_points, task_overrides
from experiments.console import say
from experiments.launch.environment import is_main_rank
from experiments.point.point import Point
from experiments.registry import discover, for_every_model
from experiments.results.kept import is_kept
from experiments.results.run_folder import RunFolder
from experiments.results.sweep import sweep_folder, write_sweep
from experiments.results.times import read_times
from experiments.routers.base import SkippedPoint
from experiments.text.prepare import prepare_point
from results_schema.advising import ADVISING, COLD_ROUNDS, STATIC
from results_schema.files import SWEEP, SWEEP_DIR_VARIABLE


class ValidateSweep(Callback):
    """Composes all points of a multirun as Hydra will, and stops with one clear error if any is wrong."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Refuse a launcher that a single run does not use."""
        with _one_clear_error():
            if is_submitted(config):
                raise ValueError(
                    "hydra/launcher: 'slurm', must be basic without a sweep; --multirun makes one of a single point"
                )
            if config.get("dry_run") is True:
                point = load_point(config)
                if point.routing_remark and is_main_rank():
                    say(point.routing_remark)
                _describe([point], [{}])

    def on_run_end(self, config: DictConfig, **given: Any) -> None:  # noqa: ARG002
        """Let the process fail if a system failed its check; everything else is kept and reported by then."""
        job_return: JobReturn = given["job_return"]
        if job_return.status == JobStatus.COMPLETED and job_return.return_value is not None:
            _fail_for_systems([Path(job_return.return_value)])

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002
        """Likewise, for any point of the sweep."""
        sweep = os.environ.get(SWEEP_DIR_VARIABLE)
        if sweep is not None and is_main_rank():
            content = json.loads(Path(sweep, SWEEP).read_text(encoding="utf-8"))
            _fail_for_systems([Path(sweep).parent.parent / run_id for run_id in content["run_ids"]])

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check all points and write ``sweeps/<sweep_id>/sweep.json``."""
        with _one_clear_error():
            absent = leave_out_absent(config)
            swept, axes = sweep_points(config)
            points, values = [point for point, _ in swept], [values for _, values in swept]
            check_launcher(config, points)
            _check_recordings(points, axes)
            _check_advice(points)
            for remark in _remarks(config, absent, points) if is_main_rank() else ():
                say(remark)
            if points[0].options.dry_run:
                _describe(points, values)
            if is_main_rank():
                _check_texts(points)
            _write_sweep(points, values, axes)
            announce(points)
            _name_unavailable(points[0])


@contextmanager
def _one_clear_error() -> Iterator[None]:
    """End the process with one line on what is wrong, or was left out."""
    try:
        yield
    except SkippedPoint as reason:
        say(f"skipped: {reason}")
        raise SystemExit(0) from None
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        fail(explain(error), 2)
    except Exception as error:  # Hydra would make it a warning and start the sweep unchecked
        traceback.print_exc()
        raise SystemExit(1) from error


def _describe(points: Sequence[Point], values: Sequence[dict[str, Any]]) -> NoReturn:
    """Print what would be run, and end the process."""
    if is_main_rank():
        print("\n".join(describe_runs(points, values)))
    raise SystemExit(0)


def check_launcher(config: DictConfig, points: Sequence[Point]) -> None:
    """Refuse to measure beside other measurements.

    Raises:
        ValueError: several processes are asked for, and not all points are simulated.
    """
    if is_parallel(config) and not all(point.simulated for point in points):
        raise ValueError("hydra/launcher: 'cores', must be basic with backend=ranks, which need the machine alone")


def _fail_for_systems(folders: Sequence[Path]) -> None:
    if any(RunFolder(folder).failed_systems for folder in folders):
        raise SystemExit(1)


def _remarks(config: DictConfig, absent: Mapping[str, str], points: Sequence[Point]) -> Iterator[str]:
    """Yield what is not as one might expect: capped shares, options that are not swept, a sweep over ``system``."""
    yield from dict.fromkeys(point.routing_remark for point in points if point.routing_remark)
    for option, choice in absent.items():
        yield f"{option}: not swept, as {choice} has no such option"
    for override in parse_overrides(task_overrides(config)):
        if override.get_key_element() == "system" and override.is_sweep_override():
            values = list(override.sweep_string_iterator())
            names = dict.fromkeys(name.strip() for value in values for name in value.strip("[]").split(","))
            yield (
                f"{override.input_line}: {len(values)} jobs one after another, unpaired; to compare these systems "
                f"round by round, name them in one list: 'system=[{','.join(names)}]'"
            )


def _name_unavailable(point: Point) -> None:
    """Where all systems are compared, name those that this installation lacks."""
    found, unavailable = discover("system")
    if is_main_rank() and {name for name, cls in found.items() if for_every_model(cls)} <= set(point.systems):
        for name, reason in unavailable.items():
            say(f"not compared: {name} ({reason})")


def _check_recordings(points: Sequence[Point], axes: Sequence[str]) -> None:
    """Refuse points that would record their routing into one file: each replaces, and then refuses, another's."""
    files: dict[Path, int] = {}
    for point in points:
        if point.options.trace.record is not None:
            path = Path(point.options.trace.record).absolute()
            files[path] = files.get(path, 0) + 1
    for path, number in files.items():
        if number > 1:
            example = f"{path.stem}-${{{axes[0] if axes else 'tag'}}}.parquet"
            raise ValueError(
                f"trace.record: {path.name!r} for {number} points, must be a file of each point's own, such as "
                f"'trace.record={example}'"
            )


def _check_advice(points: Sequence[Point]) -> None:
    """Refuse points that no advice can be made of."""
    for point in points:
        options = point.options
        if options.experiment not in ADVISING:
            return
        if STATIC not in point.systems:
            raise ValueError(f"system: {', '.join(point.systems)}, must include {STATIC}, which all are compared with")
        if options.rounds <= COLD_ROUNDS and not options.requests.open_loop:
            raise ValueError(f"rounds: {options.rounds}, must be at least {COLD_ROUNDS + 1} for advice")


def _check_texts(points: Sequence[Point]) -> None:
    """Refuse a point whose sequences are longer than its text, before an earlier point has run for hours."""
    for point in points:
        if point.reads_text and not is_kept(point):
            prepare_point(point)


def _write_sweep(points: Sequence[Point], values: Sequence[dict[str, Any]], axes: Sequence[str]) -> None:
    folder = sweep_folder(points, axes)
    os.environ[SWEEP_DIR_VARIABLE] = str(folder)
    if not is_main_rank():
        return
    write_sweep(folder, points, axes, values)
    todo = [point for point in points if not is_kept(point)]
    number = "1 point" if len(points) == 1 else f"{len(points)} points"
    time = total_time(todo, read_times(Path(points[0].options.results_dir)))
    estimate = f"; {time}" if time.startswith("about") else ""
    say(f"{points[0].options.experiment}: {number}, {num_to_run(todo)}; results in {folder.parent.parent}{estimate}")
