"""A section of the report: runs that may stand in one table and one plot, with what is derived from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.data.load import Run
from analysis.present.style import label
from analysis.present.table import caption, knowledge_legend, unpaired_remark

_AXIS_NAMES = {
    "router.skew": "router skew",
    "router.num_hot": "hot experts",
    "router.case": "recorded routing",
    "world_size": "number of ranks",
    "dataset": "data set",
    "seq_len": "tokens per sequence",
    "batch_size": "sequences per rank",
}


@dataclass(frozen=True)
class Section:
    """Runs of one backend and scope.

    Attributes:
        title: of the sweep or the run.
        runs: the runs, at least one.
        points: for each of them its values of the options that tell them apart.
        frame: their summaries (`analysis.present.table.summary_frame`).
        missing: runs of the sweep that are not finished, with what is known of them.
        apart: why these runs stand apart from others of the same sweep; None: they are all.
        figures: the PNG files that were drawn of them.
    """

    title: str
    runs: Sequence[Run]
    points: Sequence[Mapping[str, Any]]
    frame: pd.DataFrame
    missing: Sequence[str] = ()
    apart: str | None = None
    figures: Sequence[Path] = ()

    @cached_property
    def unpaired(self) -> str:
        """What to say where systems were not measured in the same runs; empty: they were."""
        return unpaired_remark(self.frame)

    @cached_property
    def letters(self) -> str:
        """What the letters behind systems' names mean; empty where there are none."""
        return knowledge_legend(self.frame)

    @cached_property
    def values(self) -> list[pd.DataFrame]:
        """Metrics per iteration of every run."""
        return [run.values for run in self.runs]

    @cached_property
    def axes(self) -> list[str]:
        """Options whose values differ between the points, the one with the most values first."""
        count = {axis: len({_key(point[axis]) for point in self.points}) for axis in self.points[0]}
        return sorted((axis for axis in count if count[axis] > 1), key=lambda axis: -count[axis])

    @cached_property
    def labels(self) -> list[str]:
        """A name for every point; of a single run its values, or nothing."""
        names = [point_label(point, self.axes or list(point)) for point in self.points]
        twice = {name for name in names if names.count(name) > 1}
        return [
            f"{name} ({run.manifest['run_id']})".strip() if name in twice else name
            for name, run in zip(names, self.runs, strict=True)
        ]

    @cached_property
    def systems(self) -> dict[str, dict[str, Any]]:
        """What the manifests say of every system that has results, in the order of the first run that has it."""
        there = set(self.frame["system"])
        return {name: kind for run in self.runs for name, kind in run.systems.items() if name in there}

    @property
    def caption(self) -> str:
        """What the numbers were measured on, in short."""
        return caption(self.frame)

    @property
    def origin(self) -> str:
        """What tells it from others of its title in a list: the day, the model, what made the numbers."""
        ended = max(str(run.manifest.get("ended_at") or "")[:10] for run in self.runs)
        made = " on ".join(" + ".join(dict.fromkeys(map(str, self.frame[key]))) for key in ("backend", "device"))
        parts = (
            ended,
            " + ".join(dict.fromkeys(self.frame["model_name"])),
            f"{span(self.frame['world_size'])} ranks",
            made,
        )
        return ", ".join(part for part in parts if part)

    @property
    def simulated(self) -> bool:
        """Whether a simulator made these numbers."""
        return self.runs[0].simulated

    def rows(self, run: Run) -> pd.DataFrame:
        """Return the summary rows of a run."""
        rows: pd.DataFrame = self.frame[self.frame["run_id"] == run.manifest["run_id"]]
        return rows


def split_sections(
    runs: Sequence[Run],
    points: Sequence[Mapping[str, Any]],
    frame: pd.DataFrame,
    title: str,
    missing: Sequence[str] = (),
    folder: Path | None = None,
) -> list[Section]:
    """Divide runs so that no section mixes backends or scopes: their numbers never share a table or a plot.

    Args:
        runs: the runs.
        points: for each of them its values of the options that tell them apart.
        frame: their summaries.
        title: of the sweep or the run.
        missing: runs of the sweep that are not finished, with what is known of them.
        folder: of the sweep or the run, with its figures.
    """
    kinds = [(run.manifest["backend"], run.manifest["scope"]) for run in runs]
    different = list(dict.fromkeys(kinds))
    if len(different) == 1:
        # A hidden one is being written by another process, which soon gives it its name.
        figures = sorted((folder / "figures").glob("[!.]*.png")) if folder else ()
        return [Section(title, runs, points, frame, missing, figures=figures)]
    names = {kind: f"{kind[0]}, scope {kind[1]}" for kind in different}
    sections = []
    for kind in different:
        chosen = [i for i, other in enumerate(kinds) if other == kind]
        ids = {runs[i].manifest["run_id"] for i in chosen}
        others = "; ".join(name for other, name in names.items() if other != kind)
        sections.append(
            Section(
                f"{title}: {names[kind]}",
                [runs[i] for i in chosen],
                [points[i] for i in chosen],
                frame[frame["run_id"].isin(ids)],
                missing,
                f"The same sweep has runs of another kind ({others}). They have a section of their own, because their "
                "numbers cannot be compared with these.",
            )
        )
    return sections


def axis_name(axis: str) -> str:
    """Return an option's name for people."""
    return _AXIS_NAMES.get(axis, axis.rsplit(".", 1)[-1].replace("_", " "))


def value_text(value: Any) -> str:
    """Return an option's value as it stands on an axis."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def point_label(point: Mapping[str, Any], axes: Sequence[str]) -> str:
    """Name a point by its values."""
    return ", ".join(
        f"{value_text(point[axis])} ranks" if axis == "world_size" else f"{axis_name(axis)} {value_text(point[axis])}"
        for axis in axes
    )


def prose(system: str) -> str:
    """Return a system's name for a sentence, where commas stand between systems."""
    name, _, variant = label(system).partition(", ")
    return f"{name} ({variant})" if variant else name


def names_of(systems: Sequence[str]) -> str:
    """List systems in a sentence."""
    names = [prose(system) for system in systems]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def span(values: pd.Series[Any]) -> str:
    """Return a number, or the smallest and the largest of several."""
    low, high = values.min(), values.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def joined(values: pd.Series[Any]) -> str:
    """Return the distinct values."""
    return ", ".join(dict.fromkeys(str(value) for value in values))


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
