"""How popular experts are, from what a run recorded of its routing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd


def gini(values: npt.ArrayLike) -> float:
    """Return the Gini index of numbers that are not negative: 0 where all are equal, (n - 1) / n where one has all.

    Args:
        values: float ``[n]``.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    total, n = float(ordered.sum()), len(ordered)
    if total == 0:
        return 0.0
    return float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * total) - (n + 1) / n)


def gini_by_round(routing: pd.DataFrame) -> pd.Series:
    """Return the Gini index of every round: mean of the layers', weighted by their assignments.

    Args:
        routing: rows of ``routing.parquet``.

    Returns:
        Indexed by round.
    """
    found = {}
    for index, rows in routing.groupby("round"):
        counts = np.stack(rows["counts"].to_list())
        weights = counts.sum(axis=1)
        values = [gini(layer) for layer in counts]
        found[index] = float(np.average(values, weights=weights)) if weights.sum() else 0.0
    return pd.Series(found, name="gini")


def sorted_shares(routing: pd.DataFrame) -> pd.DataFrame:
    """Return every layer's shares of assignments over all rounds, from its most to its least popular expert.

    Args:
        routing: rows of ``routing.parquet``.

    Returns:
        Columns ``stack``, ``layer``, ``position`` (from 1) and ``share``; layers without assignments are left out.
    """
    rows = []
    for (stack, layer), group in routing.groupby(["stack", "layer"]):
        counts = np.sum(group["counts"].to_list(), axis=0)
        if counts.sum() == 0:
            continue
        shares = np.sort(counts / counts.sum())[::-1]
        rows += [(stack, layer, position, share) for position, share in enumerate(shares, start=1)]
    return pd.DataFrame(rows, columns=["stack", "layer", "position", "share"])
