"""What stands in place of the table of all points where there are too many of them to read."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.table import Table

from analysis.data.ratios import over_points, point_ratios
from analysis.present.style import label, marked
from analysis.present.table import caption, knowledge_legend

#: With more points than this, systems are shown by their ratios over all points.
MANY_POINTS = 24
#: Likewise with more rows: points times systems.
MANY_ROWS = 250
#: Points named at which our system does worst.
_LOWEST = 12


def build_ratio_table(frame: pd.DataFrame, axes: Sequence[str], title: str) -> Table:
    """Lay out every exact system's ratios over all points, and below it where ours has its lowest.

    Args:
        frame: a summary frame (`analysis.present.table.summary_frame`).
        axes: its columns that tell the points apart.
        title: of the table.
    """
    number = frame["run_id"].nunique()
    knows = frame.drop_duplicates("system").set_index("system").get("knows", pd.Series(dtype=object))
    table = Table(
        title=f"{title}: {number} points",
        caption=f"{caption(frame)}\n{knowledge_legend(frame)}.\nRatio: throughput to that of the best exact system of "
        f"others at the same point, paired by round.{lowest_points(frame, axes)}",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("system", overflow="fold")
    rows = over_points(frame)
    kept = rows["to_no_skew"].notna().any()
    for name in ("first at", "of points", "worst ratio", "median", "best", *(["to best at no skew"] if kept else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows.to_dict("records"):
        table.add_row(
            marked(str(row["system"]), knows.get(row["system"])),
            str(row["first"]),
            str(row["points"]),
            *(f"{row[name]:.2f}" for name in ("worst", "median", "best", *(["to_no_skew"] if kept else []))),
        )
    return table


def lowest_points(frame: pd.DataFrame, axes: Sequence[str]) -> str:
    """Name the points at which our first system does worst, and the rival that is best there; empty: none is ours."""
    ours = frame.loc[frame["exact"] & ~frame["baseline"] & ~frame["bound"], "system"]
    if ours.empty:
        return ""
    system = str(ours.iloc[0])
    rows = point_ratios(frame, axes, system).head(_LOWEST)
    lines = [
        f"  {row['ratio']:.2f} to {label(row['rival'])}: "
        + ", ".join(f"{axis.rpartition('.')[2]}={row[axis]}" for axis in axes)
        for row in rows.to_dict("records")
    ]
    return f"\n{label(system)}'s lowest:\n" + "\n".join(lines)
