"""After every run its summary and W&B log; after a sweep, or a single run, the table and the figures.

Hydra imports this whenever run.py starts, so what reads, draws and logs results is imported when a run has ended.
"""

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

from results_schema.atomic import write_error
from results_schema.files import SWEEP_DIR_VARIABLE
from results_schema.manifest import is_finished


class Report(Callback):
    """Reads what the experiment wrote; an error is printed and ends the process with status 1 when all is done."""

    def __init__(self) -> None:
        self._failed = False

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Summarise, report and log the run that just ended; a run of a sweep is not printed."""
        if job_return.status != JobStatus.COMPLETED or job_return.return_value is None:
            return
        folder = Path(job_return.return_value)
        if not is_finished(folder):
            return  # no system passed its check
        with self._errors_printed(folder):
            from analysis.report.finish import finish_run

            is_single = job_return.hydra_cfg is None or job_return.hydra_cfg.hydra.mode == RunMode.RUN
            finish_run(Path(job_return.return_value), config, _sweep_dir(), is_single=is_single)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Report and log the sweep."""
        sweep_dir = _sweep_dir()
        if sweep_dir is not None and os.environ.get("RANK", "0") == "0":
            with self._errors_printed(sweep_dir):
                from analysis.report.finish import finish_sweep

                finish_sweep(sweep_dir, config)
        self.on_run_end(config)

    def on_run_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ARG002
        """Let the process fail if a result could not be read or reported."""
        if self._failed:
            raise SystemExit(1)

    @contextmanager
    def _errors_printed(self, folder: Path) -> Iterator[None]:
        # Hydra would make a warning of any exception that leaves a callback.
        try:
            yield
        except (OSError, ValueError) as error:
            # Libraries that draw say that a disk is full, but not where.
            if isinstance(error, OSError) and error.filename is None and error.errno is not None:
                error = write_error(folder, error)
            print(f"error: {error}", file=sys.stderr)
            self._failed = True
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            self._failed = True


def _sweep_dir() -> Path | None:
    folder = os.environ.get(SWEEP_DIR_VARIABLE)
    return Path(folder) if folder else None
