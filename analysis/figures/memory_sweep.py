"""Less memory than experts: time, hits, and where tokens are computed, against the slots that a rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.data.load import Run
from analysis.data.paper_values import load_published
from analysis.data.stats import median_interval
from analysis.figures.kit.base import FigureData, Source
from analysis.figures.kit.lines import decimal_log, system_line
from analysis.present.layout import PAGE_IN, entries_of, new_figure, set_caption, set_legend
from analysis.present.style import look

NAME = "memory_sweep"
SOURCE = Source(
    "memory_sweep",
    minutes=6,
    simulated="experiment=memory_sweep backend=simulator hardware=a6000_xeon rounds=3 seq_len=64 decode_tokens=8",
)
_SLOTS = "num_slots"
_PUBLISHED = {"mrs": ("hybrimoe", "Published: MRS"), "lru": ("cpu_gpu_lru", "Published: LRU")}
_GIB = 2**30


@dataclass(frozen=True)
class _Measure:
    """What a panel shows of a phase.

    Attributes:
        name: the end of its column, behind ``prefill_`` or ``decode_``.
        title: for people.
        scale: from the column to what is drawn.
    """

    name: str
    title: str
    scale: float


_MEASURES = (
    _Measure("s", "Time (ms)", 1e3),
    _Measure("hit_share", "Hits (%)", 100.0),
    _Measure("host_share", "Tokens on hosts (%)", 100.0),
    _Measure("hidden_share", "Transfer hidden (%)", 100.0),
)
_PHASES = {"prefill": "Prefill", "decode": "Per token"}


def missing(data: FigureData) -> str | None:
    """Say that a decode phase at several numbers of slots is needed."""
    points = {run.config.get(_SLOTS) for run in data.runs if run.decode is not None} - {None}
    if len(points) < 2:
        return f"needs a decode phase at several num_slots: {SOURCE.command}"
    if data.axes != [_SLOTS]:
        return f"needs runs that differ in num_slots alone: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return every measure of both phases, with its interval over rounds, and memory, by slots and system."""
    return pd.DataFrame(
        [
            {_SLOTS: run.config[_SLOTS], "system": system, "expert_gib": kind["device_expert_bytes"] / _GIB}
            | _prefill(run, system)
            | _decode(run, system)
            for run in sorted(data.runs, key=lambda run: int(run.config[_SLOTS]))
            for system, kind in run.systems.items()
            if run.decode is not None and (run.decode["system"] == system).any()
        ]
    )


def plot(data: FigureData) -> Figure:
    """Draw a row of panels per phase; open markers are published hit rates of the same model."""
    frame = table(data)
    figure = new_figure(PAGE_IN, 3.9)
    panels = figure.subplots(len(_PHASES), len(_MEASURES), sharex=True)
    for row, (phase, told) in zip(panels, _PHASES.items(), strict=True):
        for axes, measure in zip(row, _MEASURES, strict=True):
            _lines(axes, data, frame, f"{phase}_{measure.name}", measure.scale)
            axes.set_title(measure.title if phase == "prefill" else "", fontsize=8, loc="left")
            if measure.name == "s":
                decimal_log(axes)
            else:
                axes.set_ylim(-3, 103)
        row[0].set_ylabel(told)
    published = _published(data.runs[0])
    _open_markers(panels[-1][1], published, float(frame[_SLOTS].min()))
    _random_cache(panels[-1][1], data.runs)
    for axes in panels[-1]:
        memory = frame.groupby(_SLOTS)["expert_gib"].max()
        axes.set_xticks(memory.index, [f"{slots}\n{gib:.2g}" for slots, gib in memory.items()])
        axes.set_xlabel("Slots per layer, GiB", fontsize=7)
    set_legend(figure, entries_of(panels[-1][1]))
    note = " Random cache: what Huang et al. (arXiv 2512.16473) compare with, by its closed form."
    if len(published):
        note += " Open markers: HybriMoE (arXiv 2504.05897), same model, its own routing; slots not known."
    set_caption(figure, data.caption + note)
    return figure


def _prefill(run: Run, system: str) -> dict[str, float]:
    rows = run.values[run.values["system"] == system]
    columns = {
        "s": "latency_s",
        "hit_share": "hit_share",
        "host_share": "host_share",
        "hidden_share": "fetch_hidden_share",
    }
    return _estimates("prefill", {name: rows[column] for name, column in columns.items()})


def _decode(run: Run, system: str) -> dict[str, float]:
    assert run.decode is not None
    rows = run.decode[run.decode["system"] == system]
    fetching = rows["fetch_s"].where(rows["fetch_s"] > 0)
    columns = {
        "s": rows["tpot_s"],
        "hit_share": 1 - rows["num_misses"] / rows["num_active_experts"],
        "host_share": rows["host_tokens"] / rows["executed_tokens"],
        "hidden_share": (1 - rows["fetch_wait_s"] / fetching).clip(lower=0).fillna(1.0),
    }
    return _estimates("decode", columns)


def _estimates(phase: str, columns: dict[str, pd.Series]) -> dict[str, float]:
    """Return the median and the ends of the interval of every column, by name."""
    found: dict[str, float] = {}
    for name, values in columns.items():
        estimate = asdict(median_interval(values))
        found |= {
            f"{phase}_{name}{end}": estimate[key] for end, key in (("", "median"), ("_low", "low"), ("_high", "high"))
        }
    return found


def _lines(axes: Axes, data: FigureData, frame: pd.DataFrame, column: str, scale: float) -> None:
    kinds = {str(kind["system"]): kind for kind in data.summary.to_dict("records")}
    for system, rows in frame.groupby("system", sort=False):
        kind = kinds[str(system)]
        middle, low, high = (rows[f"{column}{end}"] * scale for end in ("", "_low", "_high"))
        system_line(
            axes, str(system), rows[_SLOTS], middle, exact=kind["exact"], bound=kind["bound"],
            knows=kind.get("knows"), ends=(low, high),
        )  # fmt: skip


def _published(run: Run) -> pd.DataFrame:
    """Return the published hit rates of the run's model."""
    published = load_published("small_memory")
    name = str(run.config["model"].get("hub_name") or "")
    same = published["hub_name"].map(lambda prefix: name != "" and name.startswith(str(prefix)))
    return published[(published["measure"] == "hit_share") & same]


def _open_markers(axes: Axes, published: pd.DataFrame, first: float) -> None:
    """Draw published hit rates left of all slots: how many there were is not known."""
    for row in published.to_dict("records"):
        system, told = _PUBLISHED[row["variant"]]
        style = look(system)
        axes.plot(
            first * 0.7, 100 * row["value"], style.marker, markersize=5, markerfacecolor="white",
            markeredgecolor=style.colour, linestyle="none", label=told,
        )  # fmt: skip


def random_share(num_slots: int, world_size: int, num_experts: int) -> float:
    """Return how many of its experts a token finds in a cache of random ones: M / n.

    Of two, one at least is there with a probability of 1 - (n-M)/n (n-M-1)/(n-1), and both are with M/n (M-1)/(n-1)
    (Huang et al., arXiv 2512.16473); half of their sum is M/n.
    """
    return min(num_slots * world_size / num_experts, 1.0)


def _random_cache(axes: Axes, runs: Sequence[Run]) -> None:
    shares = {
        slots: random_share(slots, run.manifest["world_size"], run.manifest["model"]["num_experts"])
        for run in runs
        if (slots := run.config.get(_SLOTS)) is not None
    }
    axes.plot(
        list(shares), [100 * share for share in shares.values()], "o", markersize=7, markerfacecolor="none",
        markeredgecolor="#555555", linestyle="none", label="Random cache",
    )  # fmt: skip
