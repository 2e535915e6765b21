"""A sweep as one SLURM array job through submitit: a task per point that is still to be run, and waiting for them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

from experiments.compose.submitted import load_swept_point
from experiments.console import say
from experiments.launch.environment import adopt_slurm_step
from experiments.launch.local import InterruptedRun
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

    def __call__(self, *arguments: Any) -> JobReturn:
        """Run one point; this is what the array's tasks call."""
        os.environ[SWEEP_DIR_VARIABLE] = self._sweep_dir
        # submitit would ignore the first and, before the time is up, requeue or fail at the second; a point that was
        # stopped is run again by the sweep.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        adopt_slurm_step()
        result: JobReturn = super().__call__(*arguments)
        return result

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run all points of a sweep that are not finished, nor queued by the same sweep before.

        Raises:
            ValueError: SLURM is not here or refuses the job.
            SystemExit: a point failed (1), or Ctrl-C ended the wait (130) while SLURM goes on.
        """
        jobs: dict[str, _Job] = {}
        for num, overrides in enumerate(job_overrides, initial_job_idx):
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            point = load_swept_point(config)
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
        try:
            executor.update_parameters(**parameters)
            tasks = executor.map_array(
                self,
                [job.overrides for job in jobs],
                ["hydra.sweep.dir"] * len(jobs),
                [job.num for job in jobs],
                [f"job_id_for_{job.num}" for job in jobs],
                [Singleton.get_state()] * len(jobs),
            )
        except submitit.core.utils.FailedJobError as error:
            raise ValueError(f"hydra/launcher: 'slurm', sbatch refused the job: {error}") from error
        for job, task in zip(jobs, tasks, strict=True):
            RunFolder(job.point.folder).note_submission(task.job_id, task.paths.stdout)
        name = tasks[0].job_id.partition("_")[0]
        say(f"SLURM job {name}: {_number(len(jobs))} submitted; output in {tasks[0].paths.folder.parent}")


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


def _number(points: int, one: str = "", several: str = "") -> str:
    return f"1 point{one}" if points == 1 else f"{points} points{several}"


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
    waiting = {RunFolder(point.folder).submission["job"]: point for point in points}
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
                failed |= _has_failed(waiting.pop(job))
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
