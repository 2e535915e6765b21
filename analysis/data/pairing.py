"""Ratios of what was measured in the same rounds: of systems of a run, and of points of a group."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.data.load import Run
from analysis.data.stats import Estimate, paired_ratio
from results_schema.manifest import NOT_MEASURED
from results_schema.paired import mirrored_ratio
from results_schema.yardstick import has_moved

#: Share of a run's rounds in which the machine may move without being worth a warning.
MANY_MOVED = 0.25
_THROUGHPUT = "throughput_tokens_per_s"
#: Options in which simulations that are compared with even routing may differ.
_MAY_DIFFER = ("router", *NOT_MEASURED)


def run_ratio(run: Run, numerator: pd.Series[Any], denominator: pd.Series[Any], other: Run | None = None) -> Estimate:
    """Return the ratio of two quantities by the rounds that they share, with its interval.

    Args:
        run: the numerator's; says how its rounds went.
        numerator: indexed by round.
        denominator: likewise.
        other: the denominator's run, of the same group; None: the same.

    Raises:
        ValueError: they share no round, or a ratio is not finite.
    """
    rounds = numerator.index.intersection(denominator.index).sort_values()
    above, below = (values.loc[rounds].to_numpy() for values in (numerator, denominator))
    if not group_of(run).get("mirrored"):
        return paired_ratio(above, below)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (above / below).tolist()
    if not ratios or not np.isfinite(ratios).all() or min(ratios) <= 0:
        raise ValueError(f"ratios: {ratios}, must be at least one finite number above 0")
    moved = set(moved_rounds(run)) | set(moved_rounds(other or run))
    return Estimate(*mirrored_ratio(ratios, [index not in moved for index in rounds]))


def moved_rounds(run: Run) -> list[int]:
    """Return the rounds in which the machine's yardstick moved while the run's systems ran; none where it had none."""
    if run.yardstick is None:
        return []
    slowest = slowest_yardstick(run)
    by_round = {index: slowest.loc[index].itertuples(index=False, name=None) for index in slowest.index.unique("round")}
    return [int(index) for index, moments in by_round.items() if has_moved(moments)]


def slowest_yardstick(run: Run) -> pd.DataFrame:
    """Return what the yardstick took on the slowest rank, by round and moment: ``product_s`` and ``copy_s``."""
    assert run.yardstick is not None, "none was measured"
    return run.yardstick.groupby(["round", "moment"])[["product_s", "copy_s"]].max()


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
        runs that were neither measured together with one whose routing is even nor simulated as one was.
    """
    references = {kind: run for run in runs if is_even(run) and (kind := _together(run))}
    for run in runs:
        reference = references.get(_together(run) or "")
        best = None if reference is None else best_exact(reference)
        if reference is None or best is None:
            continue
        base = throughput(reference, best)
        for system in run.systems:
            if not (own := throughput(run, system)).empty:
                yield run, system, run_ratio(run, own, base, reference), run is reference and system == best


def measured_apart(runs: Sequence[Run]) -> list[int]:
    """Return the positions of skewed runs that are in no group with the run of the same kind that is not skewed."""
    known = {_together(run) for run in runs if is_even(run)}
    return [
        index
        for index, run in enumerate(runs)
        if known and run.manifest["point"].get("router.skew") and (kind := _together(run)) and kind not in known
    ]


def is_even(run: Run) -> bool:
    """Tell whether the router of a run was asked for no skew: force-balanced, as others call it."""
    point = run.manifest["point"]
    return bool(point.get("router.skew") == 0 or point["router"] == "uniform")


def _together(run: Run) -> str | None:
    """Return what is the same for runs that differ in nothing but their routing and may be compared.

    Simulated ones need not run together, for no machine drifts between them; None: of a rank's run, it ran alone.
    """
    if run.simulated:
        return json.dumps(
            {name: value for name, value in run.config.items() if name not in _MAY_DIFFER}, sort_keys=True
        )
    identity: str | None = group_of(run).get("id")
    return identity
