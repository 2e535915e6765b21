"""The comparison table: per point and system every number with its interval."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from analysis.data.metrics import QUANTITIES
from analysis.present.style import look, marked
from analysis.present.table import bursts, has_no_skew, significant
from analysis.report.html.section import Section

_RATIO, _NO_SKEW = "throughput_ratio_to_best_baseline", "throughput_ratio_to_no_skew"
#: A high percentile that far above the mean is worth a column.
_TAIL = 1.05


def _always(_: pd.Series[Any]) -> bool:
    return True


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        name: of the summary.
        title: above it.
        text: from a value to what is shown.
        shown: whether it says anything here.
    """

    name: str
    title: str
    text: Callable[[float], str]
    shown: Callable[[pd.Series[Any]], bool] = _always


class Cell(NamedTuple):
    """A number with its interval (empty where there is none) and what it says: ``better``, ``worse`` or nothing."""

    text: str
    interval: str = ""
    verdict: str = ""


@dataclass(frozen=True)
class Row:
    """A system at a point."""

    system: str
    name: str
    colour: str
    exact: bool
    bound: bool
    best: bool
    cells: list[Cell]


@dataclass(frozen=True)
class Group:
    """A point with its rows."""

    point: str
    rows: list[Row]


def columns_of(frame: pd.DataFrame) -> list[Column]:
    """Choose the columns that the results allow; times are in milliseconds where all are below a second."""

    def some(values: pd.Series[Any]) -> bool:
        return bool((values > 0).any())

    def column(name: str, text: Callable[[float], str], shown: Callable[[pd.Series[Any]], bool] = _always) -> Column:
        quantity = QUANTITIES[name]
        title = f"{quantity.heading}, {quantity.unit}" if quantity.unit else quantity.heading
        return Column(name, title, text, shown)

    def seconds(name: str) -> Column:
        ms = name in frame and frame[name].max() < 1
        title = f"{QUANTITIES[name].heading}, {'ms' if ms else 's'}"
        return Column(name, title, lambda v: significant(v * 1e3 if ms else v))

    # In the closed loop all requests of a batch start together, so that the tail is often the mean.
    closed, opened = (_highest(frame, loop) for loop in ("", "open_loop_"))
    has_tail = closed in frame and bool((frame[closed] > _TAIL * frame["ttft_s"]).any())
    columns = [
        column(_RATIO, _ratio),
        *([column(_NO_SKEW, _ratio)] if has_no_skew(frame) else []),
        column("throughput_tokens_per_s", _number),
        seconds("ttft_s"),
        *([seconds(closed)] if has_tail else []),
        column("idle_share", _percent),
        column("imbalance", _ratio),
        *([Column("imbalance_max", "Imbalance, worst batch", _ratio)] if bursts(frame).any() else []),
        column("num_fetches", _number, some),
        column("fetch_wait_share", _percent, some),
        column("dropped_share", _percent, some),
        column("padding_factor", _ratio, lambda values: bool((values > 1).any())),
        seconds(opened),
        seconds("tpot_s"),
        column("output_tokens_per_s", _number),
    ]
    return [c for c in columns if c.name in frame and frame[c.name].notna().any() and c.shown(frame[c.name])]


def _highest(frame: pd.DataFrame, loop: str) -> str:
    """Return the column of the highest percentile of TTFT that all rows have enough requests for."""
    names = [f"{loop}ttft_p{percent}_s" for percent in (99, 90)]
    return next((name for name in names if name in frame and frame[name].notna().all()), names[-1])


def groups_of(section: Section, columns: list[Column]) -> list[Group]:
    """Lay a section's summary out."""
    groups = []
    for name, run in zip(section.labels, section.runs, strict=True):
        rows = []
        for row in section.rows(run).to_dict("records"):
            system = str(row["system"])
            rows.append(
                Row(
                    system=system,
                    name=marked(system, row.get("knows")),
                    colour=look(system).colour,
                    exact=bool(row["exact"]),
                    bound=bool(row["bound"]),
                    best=bool(row["best_baseline"]),
                    cells=[_cell(row, column) for column in columns],
                )
            )
        groups.append(Group(name, rows))
    return groups


def csv_link(frame: pd.DataFrame) -> str:
    """Return the whole summary as a ``data:`` address that holds a CSV file."""
    return "data:text/csv;base64," + base64.b64encode(frame.to_csv(index=False).encode()).decode()


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _cell(row: dict[Any, Any], column: Column) -> Cell:
    """Write a number with its interval; the ratio to the best baseline says whether it is better or worse."""
    value = row[column.name]
    if pd.isna(value):
        return Cell("")
    low, high = row.get(f"{column.name}_low", value), row.get(f"{column.name}_high", value)
    ends = column.text(low), column.text(high)
    interval = f"[{', '.join(ends)}]" if set(ends) != {column.text(value)} else ""
    verdict = ""
    if column.name == _RATIO and row["exact"] and not row["bound"] and not row["best_baseline"]:
        verdict = "better" if low > 1 else "worse" if high < 1 else ""
    return Cell(column.text(value), interval, verdict)
