"""The table of serving: throughput, goodput and latencies by rate and system, with what their requests support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    beyond = " None was measured beyond the first rate that it fails." if last.nunique() > 1 else ""
    note = share_note(int(frame["num_requests"].min()), share)
    return f"Highest rate at which {share:.0%} are good: {'; '.join(parts)}.{beyond}" + (f" {note}" if note else "")


def share_note(num_requests: int, share: float) -> str:
    """Say that so many requests per rate are too few for a share of good ones; empty where they are enough.

    That a share keeps a limit says of a percentile where it is, and needs as many requests as that.
    """
    needed = least_samples(100 * share) if share < 1 else 0
    if num_requests >= needed:
        return ""
    return f"A share of {share:.0%} needs {needed} requests per rate to be certain, and there are {num_requests}."


@dataclass(frozen=True)
class ServingTable:
    """The table as texts, for a terminal and for a page.

    Attributes:
        title: of the table.
        points: headings of the first columns, which say at which point and rate.
        columns: headings of those behind the system's name.
        groups: by point and rate, its values and the rows: a system and its cells.
        notes: stand below it.
    """

    title: str
    points: Sequence[str]
    columns: Sequence[str]
    groups: Sequence[tuple[Sequence[str], Sequence[tuple[str, Sequence[str]]]]]
    notes: Sequence[str]


def serving_table(frame: pd.DataFrame, axes: Sequence[str], runs: Sequence[Run]) -> ServingTable:
    """Put the rows of :func:`serving_frame` into words, of which there is at least one.

    Args:
        frame: the rows.
        axes: its columns that tell points apart.
        runs: where they come from.
    """
    made = " + ".join(dict.fromkeys(f"{row.backend}, {row.device}" for row in frame.itertuples()))
    notes = [limits_note(runs) and f"{limits_note(runs)}.", support_note(frame)]
    if not axes:
        notes.append(best_rates_note(frame, share_of(runs[0])))
    percents = [p for p in dict.fromkeys((50, tail_of(frame))) if p not in unsupported(frame)]
    times = [f"{name}_p{p}_s" for name in _NAMES for p in percents if f"{name}_p{p}_s" in frame]
    good = "good_share" in frame

    def cells(row: Mapping[Any, Any]) -> list[str]:
        goods = [_number(row["goodput_per_s"]), f"{row['good_share']:.1%}"] if good else []
        numbers = (row["output_tokens_per_s"], *(row[time] * 1e3 for time in times))
        return [_number(row["requests_per_s"]), *goods, *map(_number, numbers)]

    groups = []
    for _, rows in frame.groupby([frame[axis].astype(str) for axis in axes] + [frame["rate_per_s"]], sort=False):
        first = rows.iloc[0]
        rate = f"{first['rate_per_s']:g}" if first["rate_per_s"] else "recorded"
        shown = [(str(row["system"]), cells(row)) for row in rows.to_dict("records")]
        groups.append(([*(str(first[axis]) for axis in axes), rate], shown))
    return ServingTable(
        title=f"Serving: open loop on {made}",
        points=[*(axis.rsplit(".", 1)[-1] for axis in axes), "rate/s"],
        columns=["requests/s", *(["good/s", "good"] if good else []), "tokens/s", *map(_heading, times)],
        groups=groups,
        notes=[note for note in notes if note],
    )


def build_serving_table(table: ServingTable) -> Table:
    """Lay the table out for a terminal."""
    built = Table(
        title=table.title,
        caption="\n".join(table.notes),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    for name in table.points:
        built.add_column(name, justify="right", no_wrap=True)
    built.add_column("system", overflow="fold")
    for name in table.columns:
        built.add_column(name, justify="right", overflow="fold")
    for point, rows in table.groups:
        for index, (system, cells) in enumerate(rows):
            built.add_row(*(point if index == 0 else [""] * len(point)), label(system), *cells)
        built.add_section()
    return built


def _number(value: float) -> str:
    return "" if pd.isna(value) else significant(value)


def _heading(column: str) -> str:
    name, percent, _ = column.split("_")
    return f"{_NAMES[name]}\n{percent} ms"  # in two lines it leaves names of systems the room not to be broken
