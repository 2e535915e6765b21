"""A finished run as one Weights & Biases run, with the numbers of summary.json; offline unless asked otherwise."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from analysis.load import Run
from analysis.metrics import METRICS, per_iteration

_MARKER = "logged"


def log_run(run: Run, summary: dict[str, Any], *, mode: str, group: str) -> bool:
    """Log a run, unless it was logged before; whatever goes wrong is a warning, for results do not depend on it.

    Args:
        run: the run.
        summary: its summary.
        mode: ``offline``, ``online`` (falls back to offline without a key or a connection) or ``disabled``.
        group: name that the runs of one sweep share.

    Returns:
        Whether the run is logged now.
    """
    if mode == "disabled":
        return False
    marker = run.folder / "wandb" / _MARKER
    if marker.exists():
        return True
    for attempt in ("online", "offline") if mode == "online" and _has_key() else ("offline",):
        try:
            _log(run, summary, mode=attempt, group=group)
            marker.touch()
            return True
        except Exception as error:  # noqa: BLE001  (logging must never stop a run)
            reason = " ".join(str(error).split())
            warnings.warn(
                f"W&B: {run.folder.name} was not logged {attempt} ({type(error).__name__}: {reason})", stacklevel=2
            )
    return False


def _has_key() -> bool:
    try:
        import wandb

        found = wandb.login(prompt=False, verify=False)
    except Exception:  # noqa: BLE001  (logging must never stop a run)
        found = False
    if not found:
        warnings.warn("W&B: mode is online, but there is no API key; logging offline", stacklevel=3)
    return found


def _log(run: Run, summary: dict[str, Any], *, mode: Literal["online", "offline"], group: str) -> None:
    import wandb  # slow to import, and not needed where it is disabled

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
        mode=mode,
        settings=settings,
    ) as logged:
        for round_index, rows in values.groupby("round"):
            logged.log(
                {f"{row['system']}/{metric.name}": row[metric.name] for _, row in rows.iterrows() for metric in METRICS}
                | {"round": round_index}
            )
        logged.summary.update(_flat(summary["systems"]) | {"best_baseline": summary["best_baseline"]})
        logged.log({"iterations": wandb.Table(dataframe=run.iterations)})


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested dicts by path, such as ``harmoeny/ttft_s/median``."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        below = _flat(value) if isinstance(value, dict) else {"": value}
        leaves |= {f"{name}/{path}".rstrip("/"): leaf for path, leaf in below.items()}
    return leaves
