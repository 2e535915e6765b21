"""Runs and benches outside a sweep."""

from __future__ import annotations

import torch

from experiments.console import PointProgress
from experiments.measure.bench import Bench, Rig
from experiments.point.point import Point
from experiments.results.begun import BegunRun
from experiments.results.group import new_group
from experiments.results.run_folder import RunFolder
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile
from harmoeny.runtime.exchange.comm import Communicator


def begin(*points: Point) -> list[BegunRun]:
    """Begin the runs of a group whose folders nobody else knows."""
    runs, group = [BegunRun(point, RunFolder(point.folder)) for point in points], new_group(points)
    for run in runs:
        run.folder.begin(run.point, group)
    return runs


def set_up(point: Point, tokens: TokenFile | None = None) -> Bench:
    """Set up a bench of a point that is alone, silently."""
    rig = Rig.set_up(point, Communicator(torch.device("cpu")), PointProgress("", 0, enabled=False))
    return Bench.set_up(rig, point, tokens or prepare_point(point))
