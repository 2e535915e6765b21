"""All results of a folder: which runs are drawn together, where their figures go, and which figures none allows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from analysis.data.load import Run, load_run, load_sweep
from analysis.figures.kit.base import FigureData, FigureModule, discover, draw_all, figure_data
from analysis.present.table import skew_points
from results_schema.files import MANIFEST, SWEEP, SWEEPS
from results_schema.manifest import Status, read_manifest

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


@dataclass
class Collection:
    """All results of a folder.

    Attributes:
        sets: what is drawn together.
        unreadable: what is wrong with results that were passed over.
    """

    sets: list[ResultSet] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

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


def find_results(results: Path, published: bool | None = None) -> Collection:
    """Find all sweeps, and all finished runs that belong to none.

    Args:
        results: holds ``<experiment>/<run_id>`` and ``<experiment>/sweeps/<sweep_id>``.
        published: as in `FigureData`.
    """
    collection, swept = Collection(), set[Path]()
    for path in sorted(results.glob(f"*/{SWEEPS}/*/{SWEEP}")):
        try:
            sweep = load_sweep(path.parent)
        except ValueError as error:
            collection.unreadable.append(str(error))
            continue
        swept |= {run.folder for run in sweep.runs}
        if sweep.runs:
            data = figure_data(sweep.runs, sweep.points, published)
            collection.sets.append(_result_set(sweep.experiment, path.parent.name, data))
    for path in sorted(results.glob(f"*/*/{MANIFEST}")):
        if path.parent in swept:
            continue
        try:
            if read_manifest(path.parent)["status"] != Status.FINISHED:
                continue
            run = load_run(path.parent)
        except ValueError as error:
            collection.unreadable.append(str(error))
            continue
        data = figure_data([run], skew_points([run]), published)
        collection.sets.append(_result_set(run.manifest["experiment"], path.parent.name, data))
    return collection


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
    whole = frozenset(module.NAME for module in discover() if module.missing(data) is None)
    parts = [(data, whole)]
    if len(data.runs) > 1 and (one := most_unbalanced(data)) is not None:
        others = frozenset(module.NAME for module in discover() if module.missing(one) is None)
        parts.append((one, others - whole))
    backends = {"simulated" if backend == "simulator" else "measured" for backend in data.summary["backend"]}
    devices = "-and-".join(_slug(device) for device in sorted(data.summary["device"].unique()))
    # The folder of a simulated run says the hardware, too.
    name = f"{'-and-'.join(sorted(backends))}-{devices}-{result_id.removeprefix(f'on-{devices}-')}"
    return ResultSet(Path(experiment, name), backends == {"simulated"}, parts)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_.]+", "-", text.lower()).strip("-")
