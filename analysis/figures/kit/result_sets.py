"""What is drawn of a folder of results: which runs together, into which folder, and which figures no run allows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from analysis.data.load import Run
from analysis.data.results import find_results
from analysis.figures.kit.base import FigureData, FigureModule, discover, draw_all, figure_data
from analysis.present.table import skew_points

#: Figures of single runs have a bar or a dot per rank.
_MOST_RANKS = 16


@dataclass(frozen=True)
class ResultSet:
    """Runs that are drawn together: a sweep's, or one.

    Attributes:
        name: where their figures go, below the folder of all figures: the experiment, then whether it was measured or
            simulated, on what, and an id, so that no figure overwrites one of another backend or device.
        simulated: whether no real rank ran.
        parts: what is drawn, each with the names of the figures that it allows: the whole, and of a sweep, for figures
            that need one run, its most unbalanced one.
    """

    name: Path
    simulated: bool
    parts: Sequence[tuple[FigureData, frozenset[str]]]

    @property
    def allowed(self) -> frozenset[str]:
        """Names of all figures that can be drawn."""
        return frozenset().union(*(names for _, names in self.parts))


@dataclass(frozen=True)
class ResultSets:
    """All that is drawn of a folder of results.

    Attributes:
        sets: what is drawn together.
        unreadable: what is wrong with results that were passed over.
    """

    sets: list[ResultSet]
    unreadable: list[str]

    def lacking(self) -> list[FigureModule]:
        """Return the figures that no result allows."""
        return [module for module in discover() if not any(module.NAME in found.allowed for found in self.sets)]

    def only_simulated(self) -> list[FigureModule]:
        """Return the figures that only simulations allow, though real ranks can give them."""
        return [
            module
            for module in discover()
            if module.SOURCE.minutes is not None
            and {found.simulated for found in self.sets if module.NAME in found.allowed} == {True}
        ]

    def draw(self, out: Path) -> Iterator[tuple[Path, list[str]]]:
        """Draw every figure from every result that allows it; yield each folder with the names of its figures."""
        for found in self.sets:
            drawn = [path.stem for data, names in found.parts for path in draw_all(data, out / found.name, names)[0]]
            if drawn:
                yield out / found.name, sorted(drawn)


def find_result_sets(folder: Path, published: bool | None = None) -> ResultSets:
    """Find what is drawn of a folder: all sweeps, and all finished runs that belong to none.

    Args:
        folder: holds ``<experiment>/<run_id>`` and ``<experiment>/sweeps/<sweep_id>``.
        published: as in `FigureData`.
    """
    results = find_results(folder)
    sets = [
        _result_set(sweep.experiment, sweep.folder.name, figure_data(sweep.runs, sweep.points, published))
        for sweep in results.sweeps
    ]
    sets += [
        _result_set(run.manifest["experiment"], run.folder.name, figure_data([run], skew_points([run]), published))
        for run in results.single_runs
    ]
    return ResultSets(sets, results.unreadable)


def most_unbalanced(data: FigureData) -> FigureData | None:
    """Return the run of a sweep in which some system's imbalance is the largest, with its point in the caption.

    Runs with more ranks than a figure has room for are passed over; None where all have.
    """
    rows = data.summary[data.summary["world_size"] <= _MOST_RANKS]
    if rows.empty:
        return None
    worst = rows.iloc[int(rows["imbalance"].to_numpy().argmax())]
    run: Run = next(run for run in data.runs if run.manifest["run_id"] == worst["run_id"])
    one = figure_data([run], [{axis: worst[axis] for axis in data.axes}], data.published)
    point = ", ".join(f"{axis}={worst[axis]}" for axis in data.axes)
    return replace(one, axes=[], caption=f"{one.caption} Of a sweep, {point}.")


def _result_set(experiment: str, result_id: str, data: FigureData) -> ResultSet:
    """Find the figures that some results allow; of a sweep also those that its most unbalanced run allows."""
    whole = frozenset(module.NAME for module in discover() if module.missing(data) is None)
    parts = [(data, whole)]
    if len(data.runs) > 1 and (one := most_unbalanced(data)) is not None:
        others = frozenset(module.NAME for module in discover() if module.missing(one) is None)
        parts.append((one, others - whole))
    kinds = {"simulated" if run.simulated else "measured" for run in data.runs}
    devices = "-and-".join(_slug(device) for device in sorted(data.summary["device"].unique()))
    # The folder of a simulated run says the hardware, too.
    name = f"{'-and-'.join(sorted(kinds))}-{devices}-{result_id.removeprefix(f'on-{devices}-')}"
    return ResultSet(Path(experiment, name), kinds == {"simulated"}, parts)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-")
