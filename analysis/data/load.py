"""Reads result folders, and refuses what is unfinished or incomplete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.data.metrics import per_iteration
from results_schema import tables
from results_schema.checksums import damaged
from results_schema.files import CONFIG, MANIFEST, SWEEP
from results_schema.manifest import REQUIRED_FIELDS, SIMULATOR, Status, is_finished, read_manifest
from results_schema.rates import throughput_tokens_per_s
from results_schema.walk import walk_files

#: libyaml's takes a tenth of the time, but not every build of PyYAML has it.
_SAFE = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        manifest: what ran, where and on what.
        config: the resolved configuration.
        layers: rows as docs/metrics.md defines them.
        iterations: likewise.
        requests: likewise; None: not recorded, as by the simulator.
        decode: likewise; None: no decode phase was measured.
        routing: likewise; None: not recorded, as by earlier versions.
        yardstick: likewise; None: not recorded, as by earlier versions and the simulator.
    """

    folder: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    layers: pd.DataFrame
    iterations: pd.DataFrame
    requests: pd.DataFrame | None = None
    decode: pd.DataFrame | None = None
    routing: pd.DataFrame | None = None
    yardstick: pd.DataFrame | None = None

    @property
    def systems(self) -> dict[str, dict[str, Any]]:
        """Systems by name, in the order of the configuration."""
        systems: dict[str, dict[str, Any]] = self.manifest["systems"]
        return systems

    @cached_property
    def values(self) -> pd.DataFrame:
        """All metrics of every iteration, as `per_iteration` computes them; not to be changed."""
        return per_iteration(self.layers, self.iterations)

    @property
    def simulated(self) -> bool:
        """Whether a simulator made its numbers, and no rank measured them."""
        return bool(self.manifest["backend"] == SIMULATOR)


@dataclass(frozen=True)
class Sweep:
    """The finished runs of a sweep.

    Attributes:
        folder: the sweep's own folder.
        experiment: its experiment.
        runs: the finished runs, in the sweep's order.
        points: for each of them its values of the swept options, such as ``{"router.skew": 0.5}``.
        missing: ids of runs that are not finished.
    """

    folder: Path
    experiment: str
    runs: list[Run]
    points: list[dict[str, Any]]
    missing: list[str]


def load_run(folder: Path) -> Run:
    """Load a finished run.

    Raises:
        ValueError: the run is unfinished, a file is missing or damaged, or a table lacks a column or rows.
    """
    manifest = read_manifest(folder)
    if manifest["status"] != Status.FINISHED:
        raise ValueError(f"{folder}: status is {manifest['status']!r}, must be {Status.FINISHED.value!r}")
    for path in damaged(folder, manifest):
        raise ValueError(f"{path}: not as it was written (its checksum is another); run it again")
    try:
        config = yaml.load((folder / CONFIG).read_text(encoding="utf-8"), Loader=_SAFE)  # noqa: S506  (a safe one)
        frames = {
            table.name: pd.read_parquet(path, partitioning=None)  # a name=value in the path is no column
            for table in tables.TABLES
            if (path := folder / table.file).exists() or table.always
        }
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{folder}: cannot be read ({error}); delete the folder and run it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/{CONFIG}: holds no configuration; delete the folder and run it again")
    for table in tables.TABLES:
        for column in table.columns:
            if column.added is not None and table.name in frames and column.name not in frames[table.name]:
                frame = frames[table.name]
                empty = column.added == ()
                frame[column.name] = [()] * len(frame) if empty else column.added
    run = Run(folder, manifest, config, **frames)
    _check_complete(run, frames)
    # Runs of earlier revisions had another definition.
    restoring_s = run.layers.groupby(["iteration", "rank"])["restore_s"].sum().groupby("iteration").max()
    taken = (run.iterations[name] for name in ("input_tokens", "latency_s"))
    of_links = run.iterations["iteration"].map(restoring_s)
    run.iterations["throughput_tokens_per_s"] = list(map(throughput_tokens_per_s, *taken, of_links))
    return run


def _check_complete(run: Run, frames: Mapping[str, pd.DataFrame]) -> None:
    """Refuse a run whose manifest lacks a field, or a table a column or rows."""
    missing = [(f"{MANIFEST}: field", field) for field in REQUIRED_FIELDS if field not in run.manifest]
    missing += [
        (f"{table.file}: column", column)
        for table in tables.TABLES
        if table.name in frames
        for column in table.column_names
        if column not in frames[table.name]
    ]
    if missing:
        where, name = missing[0]
        raise ValueError(f"{run.folder}/{where} {name!r} is missing")
    num_rounds = run.iterations["round"].nunique()
    rows_per_iteration = run.manifest["model"]["num_moe_layers"] * run.manifest["world_size"]
    for table, found, expected in (
        (tables.ITERATIONS, len(run.iterations), len(run.systems) * num_rounds),
        (tables.LAYERS, len(run.layers), len(run.iterations) * rows_per_iteration),
    ):
        if found != expected or not expected:
            raise ValueError(f"{run.folder}/{table.file}: {found} rows, must be {expected or 'at least 1'}")


def find_runs(folder: Path) -> list[Run]:
    """Load all finished runs in or under a folder, by path.

    Raises:
        ValueError: a finished run is damaged.
    """
    return [load_run(run) for run in run_folders(folder) if is_finished(run)]


def run_folders(folder: Path) -> list[Path]:
    """Return the folders of all runs in or under a folder, finished or not, by path; links to folders are followed."""
    return _folders_with(MANIFEST, folder)


def sweep_folders(folder: Path) -> list[Path]:
    """Return the folders of all sweeps in or under a folder, by path; links to folders are followed."""
    return _folders_with(SWEEP, folder)


def _folders_with(name: str, folder: Path) -> list[Path]:
    files = (path for path in walk_files(folder, skip_unreadable=True) if path.name == name)
    return sorted(path.parent for path in files if path.is_file())


def load_sweep(folder: Path) -> Sweep:
    """Load a sweep from the folder that holds its ``sweep.json``.

    Raises:
        ValueError: there is no readable ``sweep.json``, or a finished run is damaged.
    """
    try:
        content = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
        experiment, pairs = content["experiment"], list(zip(content["run_ids"], content["values"], strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no readable {SWEEP} ({error})") from error
    sweep = Sweep(folder, experiment, [], [], [])
    for run_id, values in pairs:
        path = folder.parent.parent / run_id
        if is_finished(path):
            sweep.runs.append(load_run(path))
            sweep.points.append(values)
        else:
            sweep.missing.append(run_id)
    return sweep
