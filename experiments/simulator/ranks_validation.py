"""Compares the simulator with layers that real ranks of this machine were measured in, now or some time ago."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.point.options import Options
from experiments.point.point import Point
from experiments.simulator.backend import Simulator, simulate
from results_schema.tables import LAYERS

#: That a point is predicted with.
NUM_SEEDS = 15


def measure_runs(runs: Iterable[tuple[Path, Point]]) -> pd.DataFrame:
    """Read the layer latency of real runs: median over rounds of the mean over layers of the slowest rank's.

    Args:
        runs: folders of finished runs on real ranks, with any router but the model's own, and their points.

    Returns:
        One row per run and system: system, case, published (measured here) in ms, device that measured.
    """
    rows = []
    for folder, point in runs:
        layers = pd.read_parquet(folder / LAYERS.file, partitioning=None)
        rows += [
            {"system": system, "case": case_of(point), "published": value, "device": layers["device"].iloc[0]}
            for system, value in _layer_ms(layers).items()
        ]
    return pd.DataFrame(rows)


def predict_runs(measured: pd.DataFrame, points: Iterable[Point]) -> pd.DataFrame:
    """Predict what :func:`measure_runs` gave.

    Args:
        measured: its rows; those of no point or system stay out.
        points: the same points with the simulator as their backend and this machine as their hardware.

    Returns:
        The rows with predicted in ms, error, and calibration, which is nowhere true. Predicted is a median over several
        seeds: the few rounds of one have ranks that happen to be slow.
    """
    rows = []
    for point in points:
        predicted = _layer_ms(_simulated_layers(point)).rename("predicted")
        rows.append(measured[measured["case"] == case_of(point)].join(predicted, on="system", how="inner"))
    frame = pd.concat(rows, ignore_index=True)
    return frame.assign(error=frame["predicted"] / frame["published"] - 1, calibration=False)


def case_of(point: Point) -> str:
    """Return what tells a point from the others: its skew, or its router."""
    skew = getattr(point.router, "skew", None)
    return point.router.name if skew is None else f"skew {skew:g}"


def simulated_config(config: Mapping[str, Any], hardware: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as the simulator runs it on a description of this machine.

    Options that have been added since are as conf/config.yaml has them in ``hardware``'s own composition; those that
    are gone are left out.

    Args:
        config: the configuration of a run on real ranks.
        hardware: a composed configuration with the description.
    """
    known = {option.name for option in fields(Options)}
    kept = {name: value for name, value in config.items() if name in known}
    changed = {"backend": Simulator.name, "hardware": hardware["hardware"]}
    return dict(hardware) | kept | changed


def _simulated_layers(point: Point) -> pd.DataFrame:
    """Return layers of a point's rounds with as many seeds as count."""
    drawn = []
    for index in range(NUM_SEEDS):
        seeded = replace(point, options=replace(point.options, seed=point.options.seed + index))
        layers = simulate(seeded).tables(seeded)[LAYERS]
        drawn.append(layers.assign(round=layers["round"] + index * point.options.rounds))
    return pd.concat(drawn, ignore_index=True)


def _layer_ms(layers: pd.DataFrame) -> pd.Series:
    """Return the latency of a layer in ms by system."""
    slowest = layers.groupby(["system", "round", "layer"])["layer_s"].max()
    return slowest.groupby(["system", "round"]).mean().groupby("system").median() * 1e3
