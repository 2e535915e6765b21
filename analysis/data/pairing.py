"""Ratios of what was measured in the same rounds: of systems of a run, and of points of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.data.load import Run
from analysis.data.stats import Estimate, paired_ratio
from results_schema.paired import mirrored_ratio

_THROUGHPUT = "throughput_tokens_per_s"


def run_ratio(run: Run, numerator: pd.Series[Any], denominator: pd.Series[Any]) -> Estimate:
    """Return the ratio of two quantities by the rounds that they share, with its interval.

    Args:
        run: says how its rounds went; the other quantity's run is of the same group.
        numerator: indexed by round.
        denominator: likewise.

    Raises:
        ValueError: they share no round, or a ratio is not finite.
    """
    both = pd.concat({"numerator": numerator, "denominator": denominator}, axis=1, join="inner").sort_index()
    if not group_of(run).get("mirrored"):
        return paired_ratio(both["numerator"], both["denominator"])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (both["numerator"] / both["denominator"]).tolist()
    if not ratios or not np.isfinite(ratios).all() or min(ratios) <= 0:
        raise ValueError(f"ratios: {ratios}, must be at least one finite number above 0")
    return Estimate(*mirrored_ratio(ratios, [True] * len(ratios)))


def group_of(run: Run) -> dict[str, Any]:
    """Return what the manifest says of what was measured together; empty for runs of earlier versions."""
    group: dict[str, Any] = run.manifest.get("group") or {}
    return group


def throughput(run: Run, system: str) -> pd.Series[Any]:
    """Return a system's throughput by round."""
    rows = run.iterations[run.iterations["system"] == system]
    series: pd.Series[Any] = rows.set_index("round")[_THROUGHPUT].sort_index()
    return series


def best_exact(run: Run) -> str | None:
    """Return the exact system, no bound, with the highest median throughput; None where there is none."""
    medians = run.iterations.groupby("system")[_THROUGHPUT].median()
    candidates = [name for name, kind in run.systems.items() if kind["exact"] and not kind["bound"] and name in medians]
    return max(candidates, key=lambda name: float(medians[name]), default=None)


def ratios_to_no_skew(runs: Sequence[Run]) -> Iterator[tuple[Run, str, Estimate, bool]]:
    """Compare every system with the best exact one where routing is not skewed, in the rounds that both share.

    Yields:
        Run, system, the ratio of throughputs, and whether the system is the one that all are compared with. Nothing of
        runs that were not measured together with one whose ``router.skew`` is 0.
    """
    references = {group_of(run)["id"]: run for run in runs if group_of(run) and is_even(run)}
    for run in runs:
        reference = references.get(group_of(run).get("id", ""))
        best = None if reference is None else best_exact(reference)
        if reference is None or best is None:
            continue
        base = throughput(reference, best)
        for system in run.systems:
            if not (own := throughput(run, system)).empty:
                yield run, system, run_ratio(run, own, base), run is reference and system == best


def is_even(run: Run) -> bool:
    """Tell whether the router of a run was asked for no skew."""
    return bool(run.manifest["point"].get("router.skew") == 0)
