"""Less memory than experts: how many times as fast parts of a system make it, beside what its authors published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.data.load import Run
from analysis.data.pairing import run_ratio
from analysis.data.paper_values import load_published
from analysis.figures.kit.base import FigureData, Source
from analysis.present.layout import PAGE_IN, entries_of, new_figure, set_caption, set_legend
from analysis.present.style import label, look
from analysis.present.table import model_name

NAME = "memory_parts"
SOURCE = Source("hybrimoe_ablation", minutes=None, simulated="experiment=gpu_ndp_models")
#: What the name of a system without any of the parts ends with, and how those with one and with all are told.
_BASE, _ALL, _MEAN = "_base", "all", "mean of all models"
_PHASES = {"prefill": "Prefill", "decode": "Per token", "answer": "Prompt and tokens"}
_COLUMNS = ["model", "system", "part", "phase", "speedup", "low", "high"]


class _Claim(NamedTuple):
    """What authors published: the name of their paper, the measure of every phase in their table, and over what."""

    paper: str
    measures: dict[str, str]
    said: str


_CLAIMS = {
    "hybrimoe": _Claim(
        "HybriMoE",
        {"prefill": "prefill_speedup", "decode": "decode_speedup"},
        "HybriMoE (arXiv 2504.05897), Qwen2-57B-A14B, over kTransformers",
    ),
    "gpu_ndp": _Claim(
        "GPU-NDP", {"answer": "speedup"}, "GPU-NDP (arXiv 2601.03992), mean of four models of theirs, over MoNDE"
    ),
}


def missing(data: FigureData) -> str | None:
    """Say that a system without its parts is needed, and a decode phase."""
    if not any(_families(run) for run in data.runs):
        return f"needs a decode phase and a system beside one named ..{_BASE}: {SOURCE.command}"
    return None


def table(data: FigureData) -> pd.DataFrame:
    """Return the speed-up over the base, paired by round, of every part and phase; means over runs come last."""
    rows = [row for run in data.runs for family in _families(run) for row in _speedups(run, family)]
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    whole = frame[frame["part"] == _ALL]
    means = whole.groupby(["system", "phase"], sort=False, as_index=False)["speedup"].mean()
    several = frame["model"].nunique() > 1
    means = means.assign(model=_MEAN, part=_ALL, low=means["speedup"], high=means["speedup"])
    return pd.concat([frame, means[_COLUMNS]], ignore_index=True) if several else frame


def plot(data: FigureData) -> Figure:
    """Draw a panel per phase and a row per part, or model; open markers are published."""
    frame = table(data)
    frame = frame.assign(row=frame["model"] if frame["model"].nunique() > 1 else frame["part"].map(_told))
    rows = list(dict.fromkeys(frame["row"]))[::-1]
    families = [family for family in _CLAIMS if frame["system"].str.startswith(family).any()]
    figure = new_figure(PAGE_IN, 1.5 + 0.22 * len(rows))
    panels = figure.subplots(1, len(_PHASES), sharey=True)
    for axes, (phase, title) in zip(panels, _PHASES.items(), strict=True):
        _ours(axes, frame[frame["phase"] == phase], rows)
        for family in families:
            _published(axes, family, phase, rows)
        axes.axvline(1, color="#888888", linewidth=0.8)
        axes.set_title(title, loc="left")
        axes.set_xlabel("Times as fast as without")
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(-0.6, len(rows) - 0.4)
    set_legend(figure, {name: handle for axes in panels for name, handle in entries_of(axes).items()})
    said = "; ".join(_CLAIMS[family].said for family in families)
    set_caption(figure, f"{data.caption} Open markers: {said}." if said else data.caption)
    return figure


def _families(run: Run) -> list[str]:
    """Return the systems of which a run has one without any part, and that decoded."""
    if run.decode is None:
        return []
    return [name for name in run.systems if f"{name}{_BASE}" in run.systems]


def _speedups(run: Run, family: str) -> Iterator[dict[str, Any]]:
    base = _seconds(run, f"{family}{_BASE}")
    for system in run.systems:
        part = _ALL if system == family else system.removeprefix(f"{family}_")
        if not f"{system}_".startswith(f"{family}_") or system == f"{family}{_BASE}":
            continue
        for phase, own in _seconds(run, system).items():
            ratio = asdict(run_ratio(run, base[phase], own))
            keys = {"model": model_name(run), "system": system, "part": part, "phase": phase}
            yield keys | {"speedup": ratio["median"], "low": ratio["low"], "high": ratio["high"]}


def _seconds(run: Run, system: str) -> dict[str, pd.Series[float]]:
    """Return by phase what a system took in every round."""
    assert run.decode is not None
    prefill = run.iterations[run.iterations["system"] == system].set_index("round")["latency_s"]
    decode = run.decode[run.decode["system"] == system].set_index("round")
    return {"prefill": prefill, "decode": decode["tpot_s"], "answer": prefill + decode["decode_s"]}


def _ours(axes: Axes, frame: pd.DataFrame, rows: list[str]) -> None:
    for system, own in frame.groupby("system", sort=False):
        ends = [own["speedup"] - own["low"], own["high"] - own["speedup"]]
        style, places = look(str(system)), [rows.index(row) for row in own["row"]]
        axes.errorbar(
            own["speedup"], places, xerr=ends, fmt=style.marker, color=style.colour, markersize=5, capsize=2,
            label=label(str(system)),
        )  # fmt: skip


def _published(axes: Axes, family: str, phase: str, rows: list[str]) -> None:
    """Draw what authors published of the parts that have a row; the mean of their models stands beside that of ours."""
    claim, values = _CLAIMS[family], load_published("small_memory")
    own = values[(values["paper"] == claim.paper) & (values["measure"] == claim.measures.get(phase))]
    told = own["variant"].map(lambda variant: _MEAN if variant == "mean" else _told(variant))
    own, told = own[told.isin(rows)], told[told.isin(rows)]
    if len(own):
        axes.plot(
            own["value"], [rows.index(row) for row in told], "o", markersize=7, markerfacecolor="none",
            markeredgecolor="black", linestyle="none", label="Published",
        )  # fmt: skip


def _told(part: str) -> str:
    return "all of them" if part == _ALL else part.replace("_", " ")
