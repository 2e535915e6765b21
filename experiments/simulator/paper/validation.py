"""Compares the simulator with the paper's published figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.point.point import Point
from experiments.point.simulator_options import SoftwareCost
from experiments.simulator.advance import SimulatedBatch, SimulatedSystem
from experiments.simulator.cost import CostModel
from experiments.simulator.model_work import ModelWork, TracedModel
from experiments.simulator.paper.figures import (
    BREAKDOWNS,
    SEQ_LEN,
    WORLD_SIZE,
    Published,
    breakdown_counts,
    breakdown_ms,
    breakdown_policy,
    dataset_counts,
    fake_trace,
    skew_counts,
)
from experiments.simulator.topology import Topology
from harmoeny.placement import IntArray
from harmoeny.policy import Policy

#: Published figures closer than this are no ranking.
_TIE = 0.05


class PaperMachine:
    """The paper's machine, model and software, as ``experiment=paper_gpus`` describes them."""

    def __init__(self, point: Point) -> None:
        self._point = point
        self._topology = Topology(point.hardware, WORLD_SIZE)
        self._traced = TracedModel(point.model, SEQ_LEN)

    def work(self, batch_size: int) -> ModelWork:
        """Return what the model computes for ``batch_size`` sequences per rank."""
        return self._traced.work(batch_size)

    def run(
        self, system: str, policy: Policy, batch_size: int, batches: Iterator[list[IntArray]]
    ) -> list[SimulatedBatch]:
        """Simulate one system on some batches."""
        software = self._point.simulator.software.get(system, SoftwareCost())
        cost = CostModel(self._point.hardware, self._topology, self.work(batch_size), software)
        simulated = SimulatedSystem(policy, cost, self._point.hardware.device_memory_bytes)
        return [simulated.run(counts) for counts in batches]

    def policy(self, system: str) -> Policy:
        """Return the policy of a system."""
        return self._point.systems[system]


def compare_throughputs(
    machine: PaperMachine, reference: Path, points: Sequence[Published], num_batches: int
) -> pd.DataFrame:
    """Predict published throughputs of Switch-128.

    Args:
        machine: the paper's.
        reference: folder of the published data.
        points: what to predict.
        num_batches: batches per point; the mean of their latencies counts.

    Returns:
        One row per point: system, case, batch_size, calibration, published and predicted in sequences/s, error.
    """
    rows = []
    for point in points:
        work, policy = machine.work(point.batch_size), machine.policy(point.system)
        if point.skew is not None:
            batches = skew_counts(work, point.skew, num_batches)
        else:
            batches = dataset_counts(reference, point.case, work, num_batches)
        if policy.calibration_batches:
            trace = fake_trace(reference, point, work)
            policy = policy.fitted(trace, work.num_experts, WORLD_SIZE)
        done = machine.run(point.system, policy, point.batch_size, batches)
        latency_s = float(np.mean([batch.end_s.max() for batch in done]))
        predicted = point.batch_size * WORLD_SIZE / latency_s
        rows.append(
            {
                "system": point.system,
                "case": point.case,
                "batch_size": point.batch_size,
                "calibration": point.calibration,
                "published": point.sequences_per_s,
                "predicted": predicted,
                "error": predicted / point.sequences_per_s - 1,
            }
        )
    return pd.DataFrame(rows)


def compare_breakdowns(machine: PaperMachine, reference: Path) -> pd.DataFrame:
    """Predict the three published time breakdowns; all of them are calibration points.

    Returns:
        One row per breakdown, part of the model and phase: mean over ranks and layers in ms. ``compute`` is of the rank
        that computes longest; ``layer`` is the whole layer.
    """
    rows = []
    for breakdown in BREAKDOWNS:
        policy = breakdown_policy(machine.policy(breakdown.system), breakdown)
        counts = breakdown_counts(machine.work(breakdown.batch_size))
        (batch,) = machine.run(breakdown.system, policy, breakdown.batch_size, iter([counts]))
        for part, layers in (("encoder", range(6)), ("decoder", range(6, 12))):
            frame = pd.DataFrame([row for layer in layers for row in batch.layers[layer].rows()])
            predicted = {name: float(frame[f"{name}_s"].mean()) * 1e3 for name in ("plan", "layer")}
            predicted["compute"] = float(frame.groupby("layer")["compute_s"].max().mean()) * 1e3
            published = breakdown_ms(reference, breakdown, layers)
            rows += [
                {
                    "breakdown": breakdown.name,
                    "part": part,
                    "phase": phase,
                    "published": published[phase],
                    "predicted": predicted[phase],
                    "error": predicted[phase] / published[phase] - 1,
                }
                for phase in predicted
            ]
    return pd.DataFrame(rows)


def summarise_errors(frame: pd.DataFrame) -> dict[str, float]:
    """Return median, worst and number of the errors of points that nothing was fitted on."""
    errors = frame.loc[~frame["calibration"], "error"].abs()
    return {"median": float(errors.median()), "worst": float(errors.max()), "points": float(len(errors))}


def wrong_rankings(frame: pd.DataFrame) -> list[str]:
    """Return the pairs of systems whose order is predicted wrong although the published figures clearly differ."""
    wrong = []
    for case, rows in frame.groupby("case", sort=False):
        for one, other in combinations(rows.to_dict("records"), 2):
            ratio = one["published"] / other["published"]
            clear = max(ratio, 1 / ratio) > 1 + _TIE
            if clear and (ratio > 1) != (one["predicted"] > other["predicted"]):
                wrong.append(f"{case}: {one['system']} and {other['system']}")
    return wrong
