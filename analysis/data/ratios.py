"""How every system does over all points of a sweep: its throughput to that of the best exact rival at each of them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

RATIO = "throughput_ratio_to_best_baseline"
#: To the best exact system where the same point's routing is even (force-balanced).
TO_NO_SKEW = "throughput_ratio_to_no_skew"
_THROUGHPUT = "throughput_tokens_per_s"


def winners(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the exact system with the highest throughput at every point.

    Args:
        frame: one row per run and system, with ``run_id``, ``system``, ``exact``, ``bound`` and the throughput.

    Returns:
        The winners' rows, in the order of the runs.
    """
    ranked = frame[frame["exact"] & ~frame["bound"]]
    return ranked.loc[ranked.groupby("run_id", sort=False)[_THROUGHPUT].idxmax()]


def over_points(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row per exact system: at how many points it runs and is first, and its worst, median and best ratio.

    Args:
        frame: one row per run and system, with :data:`RATIO`, the ratio to the best exact system that is not ours, and
            where they are known with :data:`TO_NO_SKEW`.

    Returns:
        Columns ``system``, ``points``, ``first``, ``worst``, ``median``, ``best`` and ``to_no_skew``, the median of
        :data:`TO_NO_SKEW` over the points whose routing is not even itself (NaN: unknown), by falling median.
    """
    first = winners(frame)["system"].value_counts()
    exact = frame[frame["exact"] & ~frame["bound"]]
    ratios = exact.groupby("system", sort=False)[RATIO]
    table = pd.DataFrame(
        {
            "points": ratios.size(),
            "first": [int(first.get(system, 0)) for system in ratios.groups],
            "worst": ratios.min(),
            "median": ratios.median(),
            "best": ratios.max(),
            "to_no_skew": _to_no_skew(exact),
        }
    )
    return table.sort_values("median", ascending=False, kind="stable").rename_axis("system").reset_index()


def _to_no_skew(frame: pd.DataFrame) -> pd.Series:
    """Return by system the median of what it keeps of the throughput at no skew, over the points that have some."""
    if TO_NO_SKEW not in frame:
        return pd.Series(float("nan"), index=frame["system"].unique())
    even = frame.loc[frame["best_at_no_skew"].eq(other=True), "run_id"]
    kept = frame[TO_NO_SKEW].mask(frame["run_id"].isin(even))
    return kept.groupby(frame["system"], sort=False).median()


def point_ratios(frame: pd.DataFrame, axes: Sequence[str], system: str) -> pd.DataFrame:
    """Return one system's ratio at every point, the lowest first, with the best rival and the winner.

    Args:
        frame: as for :func:`over_points`, with a column per axis and ``best_baseline``.
        axes: options that tell points apart.
        system: the system.

    Returns:
        The axes' columns, ``ratio``, ``low``, ``high``, ``rival``, ``winner``, and where known :data:`TO_NO_SKEW`.
    """
    rivals = frame[frame["best_baseline"]].set_index("run_id")["system"]
    first = winners(frame).set_index("run_id")["system"]
    rows = frame[(frame["system"] == system) & frame[RATIO].notna()]
    table = rows[[*axes]].assign(
        ratio=rows[RATIO],
        low=rows[f"{RATIO}_low"],
        high=rows[f"{RATIO}_high"],
        rival=rows["run_id"].map(rivals),
        winner=rows["run_id"].map(first),
    )
    if TO_NO_SKEW in rows:
        table[TO_NO_SKEW] = rows[TO_NO_SKEW]
    return table.sort_values("ratio", kind="stable", ignore_index=True)
