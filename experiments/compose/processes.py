"""A sweep of simulated points on all cores: one process per core, which loads once what its points have in common."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from multiprocessing.sharedctypes import Synchronized

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from experiments.compose.plugins import chosen_plugin
from experiments.console import hide_progress, say
from harmoeny.cores import usable_cores

#: The launcher of ``hydra/launcher=cores``.
CORES_LAUNCHER = "hydra_plugins.harmoeny_cores.Cores"


def is_parallel(config: DictConfig) -> bool:
    """Tell whether a configuration, with its ``hydra`` node, is one for several processes."""
    return chosen_plugin(config, "launcher") == CORES_LAUNCHER


class CoresLauncher(BasicLauncher):
    """Runs jobs in forked processes; whichever is free takes the next one.

    Args:
        processes: how many; None: as many as this process may use cores.
    """

    def __init__(self, processes: int | None = None) -> None:
        super().__init__()
        self.processes = processes

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs.

        Raises:
            ValueError: a number of processes below 1.
            SystemExit: a job failed; those that had begun were ended first.
        """
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"hydra.launcher.processes: {self.processes}, must be at least 1, or null")
        number = min(self.processes or usable_cores().number, len(job_overrides))
        context = multiprocessing.get_context("fork")
        next_job: Synchronized[int] = context.Value("q", 0)
        workers = [
            context.Process(target=self._work, args=(job_overrides, initial_job_idx, next_job)) for _ in range(number)
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.terminate()
        failed = [code for worker in workers if (code := worker.exitcode)]
        if killed := [-code for code in failed if code < 0]:
            say(f"error: a process of the sweep was ended by signal {killed[0]}; the same command again resumes")
        if failed:
            raise SystemExit(max(128 - code if code < 0 else code for code in failed))
        return [JobReturn(overrides=list(own), status=JobStatus.COMPLETED) for own in job_overrides]

    def _work(self, job_overrides: Sequence[Sequence[str]], first: int, next_job: Synchronized[int]) -> None:
        """Run jobs until none is left, or one has failed anywhere."""
        hide_progress()
        try:
            while (index := _take(next_job)) < len(job_overrides):
                for done in super().launch([job_overrides[index]], first + index):
                    _ = done.return_value  # raises what the job raised
        except BaseException:
            next_job.value = len(job_overrides)
            raise


def _take(next_job: Synchronized[int]) -> int:
    with next_job.get_lock():
        next_job.value += 1
        return next_job.value - 1
