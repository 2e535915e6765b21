"""After every run its summary and W&B log; after a sweep, or a single run, the table and the figures."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from analysis.load import load_run, load_sweep
from analysis.report import report_runs, report_sweep
from analysis.summary import write_summary
from analysis.wandb_log import log_run


class Report(Callback):
    """Reads what the experiment wrote. Hydra hides a callback's exceptions, so errors are printed here."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Summarise and log the run that just ended; report it if it is no part of a sweep."""
        if job_return.status != JobStatus.COMPLETED or job_return.return_value is None:
            return
        sweep_dir = os.environ.get("HARMOENY_SWEEP_DIR")
        try:
            run = load_run(Path(job_return.return_value))
            summary = write_summary(run)
            group = Path(sweep_dir).name if sweep_dir else config.experiment
            log_run(run, summary, mode=config.wandb.mode, group=group)
            if job_return.hydra_cfg is None or job_return.hydra_cfg.hydra.mode == RunMode.RUN:
                report_runs(
                    [run], ["router.skew"] if "skew" in run.config["router"] else [], run.folder.name, run.folder
                )
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002
        """Report the sweep."""
        sweep_dir = os.environ.get("HARMOENY_SWEEP_DIR")
        if sweep_dir is None or os.environ.get("RANK", "0") != "0":
            return
        try:
            report_sweep(load_sweep(Path(sweep_dir)))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
