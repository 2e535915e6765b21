"""How every system does over all points of a sweep: its throughput to that of the best exact rival at each of them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

RATIO = "throughput_ratio_to_best_baseline"
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
        frame: one row per run and system, with :data:`RATIO`, the ratio to the best exact system that is not ours.

    Returns:
        Columns ``system``, ``points``, ``first``, ``worst``, ``median`` and ``best``, by falling median.
    """
    first = winners(frame)["system"].value_counts()
    ratios = frame[frame["exact"] & ~frame["bound"]].groupby("system", sort=False)[RATIO]
    table = pd.DataFrame(
        {
            "points": ratios.size(),
            "first": [int(first.get(system, 0)) for system in ratios.groups],
            "worst": ratios.min(),
            "median": ratios.median(),
            "best": ratios.max(),
        }
    )
    return table.sort_values("median", ascending=False, kind="stable").rename_axis("system").reset_index()


def point_ratios(frame: pd.DataFrame, axes: Sequence[str], system: str) -> pd.DataFrame:
    """Return one system's ratio at every point, the lowest first, with the best rival and the winner.

    Args:
        frame: as for :func:`over_points`, with a column per axis and ``best_baseline``.
        axes: options that tell points apart.
        system: the system.

    Returns:
        The axes' columns, ``ratio``, ``low`` and ``high``, ``rival`` and ``winner``.
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
    return table.sort_values("ratio", kind="stable", ignore_index=True)
