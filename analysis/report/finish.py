"""What happens to results as soon as a run, or a sweep, has ended: summary, report, W&B log, upload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from analysis.advice.write import HTML, write_advice
from analysis.data.load import Run, load_run, load_sweep
from analysis.data.summary import write_summary
from analysis.present.table import skew_points
from analysis.report.reports import report_runs, report_sweep, save_tables
from analysis.wandb.log import is_logged, log_run, log_sweep, sweep_group
from analysis.wandb.upload import upload
from results_schema.advising import ADVISING


def finish_run(folder: Path, config: DictConfig, sweep_dir: Path | None, *, is_single: bool) -> None:
    """Summarise and log a run, and report it unless it belongs to a sweep, which is reported as a whole.

    Args:
        folder: the run's.
        config: its configuration.
        sweep_dir: the folder of its sweep; None: it is in none.
        is_single: whether the run is all that was asked for.
    """
    run = _with_limits(load_run(folder), config)
    summary = write_summary(run)
    is_new = config.wandb.mode != "disabled" and not is_logged(run)
    if is_single or is_new:
        report = report_runs if is_single else save_tables
        saved = report([run], skew_points([run]), run.folder.name, run.folder)
    if is_new:
        group = sweep_group(sweep_dir) if sweep_dir else config.experiment
        log_run(run, summary, saved.files, group=group)
    if is_single:
        _upload(config, [run.folder])


def finish_sweep(folder: Path, config: DictConfig) -> None:
    """Report what is finished of a sweep, and log it if nothing is missing."""
    sweep = load_sweep(folder)
    sweep = replace(sweep, runs=[_with_limits(run, config) for run in sweep.runs])
    saved = report_sweep(sweep)
    if sweep.experiment in ADVISING and saved is not None:
        print("", *write_advice(sweep).lead, f"advice: {sweep.folder / HTML} (and .md)", sep="\n")
    if saved is not None and not sweep.missing and config.wandb.mode != "disabled":
        log_sweep(sweep, saved.frame, saved.files)
    _upload(config, [sweep.folder, *(run.folder for run in sweep.runs)])


def _with_limits(run: Run, config: DictConfig) -> Run:
    """Judge a run by the limits that are asked for now: it may be kept from a time when others were."""
    if "slo" not in config:
        return run
    return replace(run, config=run.config | {"slo": OmegaConf.to_container(config.slo, resolve=True)})


def _upload(config: DictConfig, folders: Sequence[Path]) -> None:
    if config.wandb.mode == "online":
        upload(folders)
