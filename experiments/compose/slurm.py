"""A sweep as one SLURM array job through submitit: a task per group of points that is missing, and waiting for them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig

from experiments.compose.groups import announce
from experiments.compose.job import fail
from experiments.compose.load import Components, load_point
from experiments.compose.submitted import load_swept_point
from experiments.console import say
from experiments.launch.environment import adopt_slurm_step
from experiments.launch.local import InterruptedRun
from experiments.point.group import grouped
from experiments.point.point import Point
from experiments.results.kept import is_done, is_kept
from experiments.results.lock import RunBusyError, hold
from experiments.results.run_folder import RunFolder
from experiments.results.sweep import point_title
from results_schema.files import SUMMARY, SWEEP_DIR_VARIABLE
from results_schema.manifest import Status

#: Between two looks at the queue: from the first to the last, so that short jobs end soon and long ones cost nothing.
_POLL_S = (1.0, 30.0)
#: A shared file system may show this late what a job wrote.
_FILES_LATE_S = 10
#: What a job's task can still come out of.
_ALIVE = "PD,CF,R,S,ST,CG"


@dataclass(frozen=True)
class _Job:
    point: Point
    overrides: list[str]
    num: int


class SlurmSweep(SlurmLauncher):  # type: ignore[misc]  # it is not typed
    """Submits what is missing of a sweep, waits for it, and says in one line each why points failed."""

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self._sweep_dir = ""

    def __call__(
        self,
        overrides: Sequence[list[str]],
        dir_key: str,
        nums: Sequence[int],
        ids: Sequence[str],
        state: dict[type, Singleton],
    ) -> list[JobReturn]:
        """Run the points of a group; this is what the array's tasks call."""
        os.environ[SWEEP_DIR_VARIABLE] = self._sweep_dir
        # submitit would ignore the first and, before the time is up, requeue or fail at the second; a point that was
        # stopped is run again by the sweep.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        adopt_slurm_step()
        Singleton.set_state(state)
        setup_globals()
        try:
            announce([load_point(self._compose(own)) for own in overrides])
        except ValueError as error:
            fail(error, 2)
        jobs = zip(overrides, nums, ids, strict=True)
        return [super(SlurmSweep, self).__call__(own, dir_key, num, job_id, state) for own, num, job_id in jobs]

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        config: DictConfig = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        return config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run all points of a sweep that are not finished, nor queued by the same sweep before.

        Raises:
            ValueError: SLURM is not here or refuses the job.
            SystemExit: a point failed (1), or Ctrl-C ended the wait (130) while SLURM goes on.
        """
        jobs: dict[str, _Job] = {}
        components = Components()
        for num, overrides in enumerate(job_overrides, initial_job_idx):
            point = load_swept_point(self._compose(overrides), components)
            jobs.setdefault(point.run_id, _Job(point, [*overrides, f"device={point.options.device}"], num))
        todo = [job for job in jobs.values() if job.point.options.force or not _is_complete(job.point)]
        queued = _queue() if todo else set()
        missing = [job for job in todo if _submitted_as(job.point) not in queued]
        if missing:
            self._submit(missing)
        if len(todo) > len(missing):
            say(f"{_number(len(todo) - len(missing), ' is', ' are')} in SLURM's queue already")
        _wait([job.point for job in todo])
        return [_result(job) for job in jobs.values()]

    def _submit(self, jobs: Sequence[_Job]) -> None:
        import submitit  # here, as it takes a while and every start of run.py would pay

        self._sweep_dir = os.environ[SWEEP_DIR_VARIABLE]
        base = [*BaseQueueConf.__dataclass_fields__]
        parameters = {k if k in base else f"slurm_{k}": v for k, v in self.params.items()}
        executor = submitit.AutoExecutor(
            folder=parameters.pop("submitit_folder"),
            cluster="slurm",
            slurm_max_num_timeout=parameters.pop("slurm_max_num_timeout"),
        )
        for job in jobs:
            if not is_kept(job.point):  # else the task has only the summary to write
                _forget(job.point)
        by_id = {job.point.run_id: job for job in jobs}
        groups = [[by_id[point.run_id] for point in group] for group in grouped([job.point for job in jobs])]
        try:
            executor.update_parameters(**parameters)
            tasks = executor.map_array(
                self,
                [[job.overrides for job in group] for group in groups],
                ["hydra.sweep.dir"] * len(groups),
                [[job.num for job in group] for group in groups],
                [[f"job_id_for_{job.num}" for job in group] for group in groups],
                [Singleton.get_state()] * len(groups),
            )
        except submitit.core.utils.FailedJobError as error:
            raise ValueError(f"hydra/launcher: 'slurm', sbatch refused the job: {error}") from error
        for group, task in zip(groups, tasks, strict=True):
            for job in group:
                RunFolder(job.point.folder).note_submission(task.job_id, task.paths.stdout)
        name = tasks[0].job_id.partition("_")[0]
        number = _number(len(jobs)) + ("" if len(tasks) == len(jobs) else f" in {_number(len(tasks), of='task')}")
        say(f"SLURM job {name}: {number} submitted; output in {tasks[0].paths.folder.parent}")


def _forget(point: Point) -> None:
    """Remove what an unfinished run left.

    Raises:
        ValueError: a process measures it.
    """
    try:
        with hold(point.folder, point_title(point.run_id), wait=False):
            RunFolder(point.folder).forget()
    except RunBusyError as error:
        raise ValueError(str(error)) from error


def _number(number: int, one: str = "", several: str = "", of: str = "point") -> str:
    return f"1 {of}{one}" if number == 1 else f"{number} {of}s{several}"


def _is_complete(point: Point) -> bool:
    return is_done(point) and (point.folder / SUMMARY).exists()


def _submitted_as(point: Point) -> str | None:
    return RunFolder(point.folder).submission.get("job")


def _queue() -> set[str]:
    """Return the ids of this user's jobs and array tasks that have not ended.

    Asks ``squeue`` and not ``sacct``: that needs a data base of past jobs, which many clusters do not have.

    Raises:
        ValueError: SLURM is not here, or does not answer.
    """
    command = ["squeue", "--me", "--noheader", "--array", f"--states={_ALIVE}", "--format=%i"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    except FileNotFoundError as error:
        raise ValueError("hydra/launcher: 'slurm', must be basic on this host, which has no squeue") from error
    except subprocess.SubprocessError as error:
        reason = getattr(error, "stderr", None) or error
        raise ValueError(f"hydra/launcher: 'slurm', but SLURM does not answer: {reason}") from error
    return set(answer.stdout.split())


def _wait(points: Sequence[Point]) -> None:
    """Wait until the jobs of all points have ended, and say how.

    Raises:
        SystemExit: a point failed, or Ctrl-C.
    """
    waiting: dict[str, list[Point]] = {}
    for point in points:
        waiting.setdefault(RunFolder(point.folder).submission["job"], []).append(point)
    failed, pause_s = False, _POLL_S[0]
    try:
        while waiting:
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.2, _POLL_S[1])
            try:
                queued = _queue()
            except ValueError:
                continue  # a controller may restart; the jobs do not mind
            for job in sorted(waiting.keys() - queued):
                for point in waiting.pop(job):
                    failed |= _has_failed(point)
    except InterruptedRun as error:
        names = " ".join(sorted({job.partition("_")[0] for job in waiting}))
        say(f"interrupted: SLURM goes on with job {names}; scancel ends it, the same command again waits for it")
        raise SystemExit(128 + error.signal) from None
    if failed:
        say("the same command again runs what is missing")
        raise SystemExit(1)


def _has_failed(point: Point) -> bool:
    """Say how a point ended."""
    folder = RunFolder(point.folder)
    reason = "ended without a result, as a cancelled or killed job does"
    end = time.monotonic() + _FILES_LATE_S
    while time.monotonic() < end:
        if _is_complete(point):
            say(f"{point_title(point.run_id)}: finished")
            return False
        manifest = folder.manifest
        if manifest.get("status") == Status.FAILED:
            reason = manifest["error"]
            break
        time.sleep(0.5)
    say(f"error: {point_title(point.run_id)}: {reason}; output in {folder.submission['output']}")
    return True


def _result(job: _Job) -> JobReturn:
    result = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
    result.return_value = str(job.point.folder)
    return result
