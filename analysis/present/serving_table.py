"""The table of serving: throughput, goodput and latencies by rate and system, with what their requests support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.table import Table

from analysis.data.load import Run
from analysis.data.serving import PERCENTILES, limits_of, max_rates, rates_of, share_of, unsupported
from analysis.data.stats import least_samples
from analysis.present.style import label
from analysis.present.table import significant

#: The option that is no axis of its own: rows have their rate.
RATE = "requests.rate_per_s"
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL"}


def serving_frame(runs: Sequence[Run], points: Sequence[Mapping[Any, Any]], axes: Sequence[str]) -> pd.DataFrame:
    """Return one row per point, rate and system of the runs that have an open loop; none where no run has.

    Args:
        runs: the runs.
        points: their values of the options that tell them apart.
        axes: those options, which become columns.
    """
    frames = []
    for run, point in zip(runs, points, strict=True):
        rows = rates_of(run)
        for place, axis in enumerate(axes):
            if not rows.empty:
                rows.insert(place, axis, point[axis])
        if not rows.empty:
            frames.append(rows.assign(backend=run.manifest["backend"], device=run.manifest["device"]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def tail_of(frame: pd.DataFrame) -> int:
    """Return the highest percentile that all rows have enough requests for; the median where they support none."""
    return max((p for p in PERCENTILES if p not in unsupported(frame)), default=PERCENTILES[0])


def support_note(frame: pd.DataFrame) -> str:
    """Say which percentiles are missing, and how many requests they need; empty where none is."""
    missing = unsupported(frame)
    if not missing:
        return ""
    needed = ", ".join(f"p{percent} {least_samples(percent)}" for percent in missing)
    return f"Percentiles need requests per rate and system: {needed}. There are {frame['num_requests'].min()}."


def limits_note(runs: Sequence[Run]) -> str:
    """Say what a good request is; empty where nothing is limited, or where runs do not agree."""
    found = {tuple(limits_of(run).items()) for run in runs}
    if len(found) > 1 or not (limits := dict(found.pop())):
        return ""
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "the whole request"}
    return "Good: " + ", ".join(f"{names[name]} up to {limit * 1e3:,.0f} ms" for name, limit in limits.items())


def best_rates_note(frame: pd.DataFrame, share: float) -> str:
    """Say up to which rate every system keeps the limits; empty where nothing is limited or one rate was measured."""
    if "good_share" not in frame or frame["rate_per_s"].nunique() < 2:
        return ""
    last = frame.groupby("system")["rate_per_s"].max()
    parts = []
    for system, rate in max_rates(frame, share).items():
        text = "below the first" if rate == 0 else f"{rate:g}/s" + (" or more" if rate == last[system] else "")
        parts.append(f"{label(system)} {text}")
    return f"Highest rate at which {share:.0%} are good: {'; '.join(parts)}."


def build_serving_table(frame: pd.DataFrame, axes: Sequence[str], runs: Sequence[Run]) -> Table:
    """Lay out the rows of :func:`serving_frame`, of which there is at least one.

    Args:
        frame: the rows.
        axes: its columns that tell points apart.
        runs: where they come from.
    """
    made = " + ".join(dict.fromkeys(f"{row.backend}, {row.device}" for row in frame.itertuples()))
    notes = [limits_note(runs) and f"{limits_note(runs)}.", support_note(frame)]
    if not axes:
        notes.append(best_rates_note(frame, share_of(runs[0])))
    table = Table(
        title=f"Serving: open loop on {made}",
        caption="\n".join(note for note in notes if note),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    tail = tail_of(frame)
    percents = [p for p in dict.fromkeys((50, tail)) if p not in unsupported(frame)]
    times = [f"{name}_p{p}_s" for name in _NAMES for p in percents if f"{name}_p{p}_s" in frame]
    for axis in axes:
        table.add_column(axis.rsplit(".", 1)[-1], justify="right", no_wrap=True)
    table.add_column("rate/s", justify="right", no_wrap=True)
    table.add_column("system", overflow="fold")
    goods = ["good/s", "good"] if "good_share" in frame else []
    for name in ("requests/s", *goods, "tokens/s", *(_heading(time) for time in times)):
        table.add_column(name, justify="right", overflow="fold")
    previous: object = None
    for row in frame.to_dict("records"):
        point = tuple(row[axis] for axis in [*axes, "rate_per_s"])
        if previous not in (None, point):
            table.add_section()
        shown = [f"{row[axis]}" for axis in axes] + [f"{row['rate_per_s']:g}" if row["rate_per_s"] else "recorded"]
        table.add_row(
            *(shown if point != previous else [""] * len(shown)),
            label(str(row["system"])),
            significant(row["requests_per_s"]),
            *([significant(row["goodput_per_s"]), f"{row['good_share']:.1%}"] if goods else []),
            significant(row["output_tokens_per_s"]),
            *(significant(row[time] * 1e3) for time in times),
        )
        previous = point
    return table


def _heading(column: str) -> str:
    name, percent, _ = column.split("_")
    return f"{_NAMES[name]} {percent} ms"
