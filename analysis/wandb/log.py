"""A finished run, or sweep, as one Weights & Biases run on disk; :mod:`analysis.wandb.upload` sends it away."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.data.load import Run, Sweep
from analysis.data.metrics import METRICS
from analysis.present.table import summary_frame

_MARKER = "logged"
#: Seconds that W&B's own process gets to start, and a run to begin: both only use this machine.
_START_S = 15


def is_logged(run: Run) -> bool:
    """Tell whether a run is recorded."""
    return _holds(run.folder, run.folder.name)


def log_run(run: Run, summary: dict[str, Any], files: Sequence[Path], *, group: str) -> bool:
    """Record a run, unless it was; whatever goes wrong is a warning, for results do not depend on it.

    Args:
        run: the run.
        summary: its summary.
        files: tables and figures in the run's folder, for the run's artifact.
        group: name that the runs of one sweep share.

    Returns:
        Whether the run is recorded now.
    """

    def fill(logged: Any) -> None:
        _log_tables(logged, comparison=summary_frame([run], [summary], [{}]), iterations=run.iterations)
        logged.define_metric("*", step_metric="round")
        for round_index, rows in run.values.groupby("round"):
            values = {
                f"{row['system']}/{metric.name}": row[metric.name]
                for row in rows.to_dict("records")
                for metric in METRICS
                if not pd.isna(row[metric.name])
            }
            logged.log(values | {"round": round_index})
        logged.summary.update(_flat(summary["systems"]) | {"best_baseline": summary["best_baseline"]})
        _log_files(logged, run.folder, files)

    return _record(
        run.folder,
        run.folder.name,
        fill,
        project=run.config["wandb"]["project"],
        name=run.folder.name,
        group=group,
        job_type=run.manifest["experiment"],
        config=run.config | {"manifest": run.manifest},
    )


def log_sweep(sweep: Sweep, frame: pd.DataFrame, files: Sequence[Path]) -> bool:
    """Record a complete sweep's table and figures, unless the same were.

    Args:
        sweep: the sweep.
        frame: its table (`analysis.present.table.summary_frame`).
        files: tables and figures in the sweep's folder, for its artifact.

    Returns:
        Whether the sweep is recorded now.
    """

    def fill(logged: Any) -> None:
        _log_tables(logged, comparison=frame)
        _log_files(logged, sweep.folder, files)

    group = sweep_group(sweep.folder)
    return _record(
        sweep.folder,
        hashlib.sha256(frame.to_csv().encode()).hexdigest(),
        fill,
        project=sweep.runs[0].config["wandb"]["project"],
        name=group,
        group=group,
        job_type="sweep",
        config={
            "experiment": sweep.experiment,
            "points": sweep.points,
            "runs": [run.folder.name for run in sweep.runs],
        },
    )


def sweep_group(folder: Path) -> str:
    """Return the group of a sweep's runs, such as ``skew_sweep-0123abcd``, from the sweep's folder."""
    return f"{folder.parent.parent.name}-{folder.name}"


def _record(folder: Path, content: str, fill: Callable[[Any], None], **described: Any) -> bool:
    """Record one W&B run in ``folder/wandb``, unless one with this content is there."""
    marker = folder / "wandb" / _MARKER
    try:
        if _holds(folder, content):
            return True
        marker.parent.mkdir(exist_ok=True)
        with _quiet_wandb(marker.parent) as wandb:
            settings = wandb.Settings(
                silent=True,
                console="off",
                init_timeout=_START_S,
                x_service_wait=_START_S,
                x_disable_stats=True,
                x_disable_machine_info=True,
                disable_git=True,  # the manifest has the revision
            )
            with wandb.init(dir=str(folder), mode="offline", settings=settings, **described) as logged:
                fill(logged)
        marker.write_text(content, encoding="utf-8")
    except Exception as error:  # noqa: BLE001  (logging must never stop a run)
        reason = " ".join(str(error).split())
        warnings.warn(f"W&B: {folder.name} was not logged ({type(error).__name__}: {reason})", stacklevel=3)
        return False
    return True


def _holds(folder: Path, content: str) -> bool:
    try:
        return (folder / "wandb" / _MARKER).read_bytes() == content.encode()
    except OSError:
        return False


@contextmanager
def _quiet_wandb(folder: Path) -> Iterator[Any]:
    """Import W&B, which then calls nobody and keeps copies of an artifact's files in ``folder``, not in the home."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # slow to import, and not needed where it is disabled

    given = os.environ.get("WANDB_DATA_DIR")
    os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve()))
    try:
        yield wandb
    finally:
        if given is None:
            del os.environ["WANDB_DATA_DIR"]


def _log_tables(logged: Any, **frames: pd.DataFrame) -> None:
    import wandb

    logged.log({name: wandb.Table(dataframe=frame) for name, frame in frames.items()})


def _log_files(logged: Any, folder: Path, files: Sequence[Path]) -> None:
    """Attach tables and figures as an artifact of type ``results``."""
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "_", logged.name), type="results")
    for path in files:
        artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
    logged.log_artifact(artifact)


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested dicts by path, such as ``harmoeny/ttft_s/median``."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        below = _flat(value) if isinstance(value, dict) else {"": value}
        leaves |= {f"{name}/{path}".rstrip("/"): leaf for path, leaf in below.items()}
    return leaves
