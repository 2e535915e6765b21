"""After every run its summary and W&B log; after a sweep, or a single run, the table and the figures."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from analysis.data.load import load_run, load_sweep
from analysis.data.summary import write_summary
from analysis.present.table import skew_points
from analysis.report.reports import report_runs, report_sweep, save_tables
from analysis.wandb.log import is_logged, log_run, log_sweep, sweep_group
from analysis.wandb.upload import upload
from results_schema.files import SWEEP_DIR_VARIABLE


class Report(Callback):
    """Reads what the experiment wrote; an error is printed and ends the process with status 1 when all is done."""

    def __init__(self) -> None:
        self._failed = False

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Summarise, report and log the run that just ended; a run of a sweep is not printed."""
        if job_return.status != JobStatus.COMPLETED or job_return.return_value is None:
            return
        sweep_dir = os.environ.get(SWEEP_DIR_VARIABLE)
        with self._errors_printed():
            run = load_run(Path(job_return.return_value))
            summary = write_summary(run)
            is_single = job_return.hydra_cfg is None or job_return.hydra_cfg.hydra.mode == RunMode.RUN
            is_new = config.wandb.mode != "disabled" and not is_logged(run)
            if is_single or is_new:
                report = report_runs if is_single else save_tables
                saved = report([run], skew_points([run]), run.folder.name, run.folder)
            if is_new:
                group = sweep_group(Path(sweep_dir)) if sweep_dir else config.experiment
                log_run(run, summary, saved.files, group=group)
            if is_single:
                _upload(config, [run.folder])

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Report and log the sweep."""
        sweep_dir = os.environ.get(SWEEP_DIR_VARIABLE)
        if sweep_dir is not None and os.environ.get("RANK", "0") == "0":
            with self._errors_printed():
                sweep = load_sweep(Path(sweep_dir))
                saved = report_sweep(sweep)
                if saved is not None and not sweep.missing and config.wandb.mode != "disabled":
                    log_sweep(sweep, saved.frame, saved.files)
                _upload(config, [sweep.folder, *(run.folder for run in sweep.runs)])
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


def _upload(config: DictConfig, folders: Sequence[Path]) -> None:
    if config.wandb.mode == "online":
        upload(folders)
