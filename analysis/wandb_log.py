"""A finished run as one Weights & Biases run, with the numbers of summary.json; offline unless asked otherwise."""

from __future__ import annotations

import os
import warnings
from typing import Any

from analysis.load import Run
from analysis.metrics import METRICS, per_iteration

_MARKER = "logged"


def log_run(run: Run, summary: dict[str, Any], *, mode: str, group: str) -> bool:
    """Log a run, unless it was logged before; whatever goes wrong is a warning, for results do not depend on it.

    Args:
        run: the run.
        summary: its summary.
        mode: ``offline``, ``online`` (falls back to offline without a key) or ``disabled``.
        group: name that the runs of one sweep share.

    Returns:
        Whether the run is logged now.
    """
    folder = run.folder / "wandb"
    if mode == "disabled" or (folder / _MARKER).exists():
        return mode != "disabled"
    try:
        _log(run, summary, mode=mode, group=group)
        (folder / _MARKER).touch()
    except Exception as error:  # noqa: BLE001  (logging must never stop a run)
        warnings.warn(f"W&B: {run.folder.name} was not logged ({type(error).__name__}: {error})", stacklevel=2)
        return False
    return True


def _log(run: Run, summary: dict[str, Any], *, mode: str, group: str) -> None:
    import wandb  # slow to import, and not needed where it is disabled

    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        warnings.warn("W&B: mode is online, but there is no API key; logging offline", stacklevel=3)
        mode = "offline"
    values = per_iteration(run.layers, run.iterations)
    (run.folder / "wandb").mkdir(exist_ok=True)
    settings = wandb.Settings(silent=True, console="off", init_timeout=30, x_disable_stats=True)
    with wandb.init(
        project=run.config["wandb"]["project"],
        name=run.folder.name,
        group=group,
        job_type=run.manifest["experiment"],
        dir=str(run.folder),
        config=run.config | {"manifest": run.manifest},
        mode="online" if mode == "online" else "offline",
        settings=settings,
    ) as logged:
        for round_index, rows in values.groupby("round"):
            logged.log(
                {f"{row['system']}/{metric.name}": row[metric.name] for _, row in rows.iterrows() for metric in METRICS}
                | {"round": round_index}
            )
        for system, entry in summary["systems"].items():
            for name, value in entry.items():
                parts = value if isinstance(value, dict) else {"": value}
                for part, number in parts.items():
                    logged.summary[f"{system}/{name}/{part}".rstrip("/")] = number
        logged.summary["best_baseline"] = summary["best_baseline"]
        logged.log({"iterations": wandb.Table(dataframe=run.iterations)})
