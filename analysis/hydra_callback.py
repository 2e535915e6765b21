"""After every run its summary and W&B log; after a sweep, or a single run, the table and the figures."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from analysis.load import load_run, load_sweep
from analysis.report import report_runs, report_sweep
from analysis.summary import write_summary
from analysis.table import skew_points
from analysis.wandb_log import log_run


class Report(Callback):
    """Reads what the experiment wrote; an error is printed and ends the process with status 1 when all is done."""

    def __init__(self) -> None:
        self._failed = False

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Summarise and log the run that just ended; report it if it is no part of a sweep."""
        if job_return.status != JobStatus.COMPLETED or job_return.return_value is None:
            return
        sweep_dir = os.environ.get("HARMOENY_SWEEP_DIR")
        with self._errors_printed():
            run = load_run(Path(job_return.return_value))
            summary = write_summary(run)
            group = Path(sweep_dir).name if sweep_dir else config.experiment
            log_run(run, summary, mode=config.wandb.mode, group=group)
            if job_return.hydra_cfg is None or job_return.hydra_cfg.hydra.mode == RunMode.RUN:
                report_runs([run], skew_points([run]), run.folder.name, run.folder)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Report the sweep."""
        sweep_dir = os.environ.get("HARMOENY_SWEEP_DIR")
        if sweep_dir is not None and os.environ.get("RANK", "0") == "0":
            with self._errors_printed():
                report_sweep(load_sweep(Path(sweep_dir)))
        self.on_run_end(config)

    def on_run_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002
        """Let the process fail if a result could not be read or reported."""
        if self._failed:
            raise SystemExit(1)

    @contextmanager
    def _errors_printed(self) -> Iterator[None]:
        # Hydra would make a warning of any exception that leaves a callback.
        try:
            yield
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            self._failed = True
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            self._failed = True
