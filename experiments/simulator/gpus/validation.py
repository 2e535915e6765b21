"""Predicts what was seen on H200s, from the profiles ``h200``, ``h200_half`` and ``h200_quarter``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from baselines.llep import LLEP
from baselines.static_ep import StaticEP
from experiments.point.simulator_options import SoftwareCost
from experiments.simulator.advance import SimulatedSystem
from experiments.simulator.cost import CostModel
from experiments.simulator.gpus import published
from experiments.simulator.gpus.published import Layer, SpeedUps
from experiments.simulator.jitter import Jitter
from experiments.simulator.model_work import ModelWork
from experiments.simulator.topology import Topology
from harmoeny.choices import KernelName
from harmoeny.hardware import Hardware
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan, home_tokens, plan_from_tokens
from harmoeny.policy import Policy

#: The profile of a rank by the number of ranks that share an H200.
PROFILES: Mapping[int, str] = {1: "h200", 2: "h200_half", 4: "h200_quarter"}
#: LLEP's planner is a Python loop over the experts with waits for the device in it. Fitted: layers of gpt-oss-120b.
_LLEP_PLAN_S_PER_EXPERT = 40e-6
#: LLEP lets its plan be where the largest load is less than so many times the mean (its README's settings).
_LLEP_CAPACITY, _LLEP_LEAST_IMBALANCE = 1.0, 1.3
_WORLD_SIZE = 8
#: In which ranks vary as their hardware says.
_ROUNDS = 11


@dataclass(kw_only=True)
class _HotEverywhere(Policy):
    """Static, but every rank holds expert 0, too, and keeps its own assignments to it."""

    name: ClassVar[str] = "balanced"
    description: ClassVar[str] = "static, the hot expert everywhere"

    def place(self, layer: int, num_experts: int, world_size: int) -> Placement:
        """Return the homes with expert 0 resident everywhere."""
        homes = super().place(layer, num_experts, world_size)
        resident = homes.resident.copy()
        resident[0] = True
        return Placement(home=homes.home, resident=resident)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Send all but expert 0's of ``counts`` (int64 ``[world_size, num_experts]``) home."""
        tokens = home_tokens(counts, placement.home)
        tokens[:, 0] = np.diag(counts[:, 0])
        return plan_from_tokens(tokens, placement)


def compare_gpus(hardware: Mapping[str, Hardware]) -> pd.DataFrame:
    """Predict all that was seen.

    Args:
        hardware: the profiles named in :data:`PROFILES`.

    Returns:
        One row per figure: system, case, unit, source, calibration, published, predicted, error.
    """
    rows = [*_products(hardware["h200"]), *_layers(hardware), *_speed_ups(hardware["h200"])]
    frame = pd.DataFrame(rows)
    return frame.assign(error=frame["predicted"] / frame["published"] - 1)


def _row(
    system: str, case: str, unit: str, source: str, calibration: bool, seen: float, predicted: float
) -> dict[str, Any]:
    return {
        "system": system, "case": case, "unit": unit, "source": source, "calibration": calibration, "published": seen,
        "predicted": predicted,
    }  # fmt: skip


def _products(h200: Hardware) -> Iterator[dict[str, Any]]:
    for seen in published.PRODUCTS:
        shape = seen.shape
        cost = CostModel(h200, Topology(h200, 1), shape.work(seen.rows), SoftwareCost())
        counts = np.full(shape.num_experts, seen.rows // shape.num_experts)
        predicted = cost.wave_s(counts.tolist()) * 1e3
        yield _row("products", "products", "ms", published.OWN, True, seen.ms, predicted)


def _layers(hardware: Mapping[str, Hardware]) -> Iterator[dict[str, Any]]:
    for seen in published.LAYERS:
        machine = hardware[PROFILES[seen.num_ranks]]
        policy = _HotEverywhere() if seen.balanced else StaticEP()
        counts = _one_hot_counts(seen)
        predicted = _layer_s(policy, machine, published.QWEN3.work(seen.num_tokens), counts, 0.0) * 1e3
        case = f"{seen.num_ranks} on one H200"
        yield _row(policy.name, case, "ms", published.OWN, seen.fitted, seen.ms, predicted)


def _one_hot_counts(seen: Layer) -> IntArray:
    """Return int64 ``[num_ranks, num_experts]``: a share goes to expert 0, the rest to all in turn."""
    shape = published.QWEN3
    num_assignments = seen.num_tokens * shape.top_k
    counts = np.bincount(
        np.arange(num_assignments - int(num_assignments * seen.skew)) % shape.num_experts, minlength=shape.num_experts
    )
    counts[0] += int(num_assignments * seen.skew)
    return np.tile(counts, (seen.num_ranks, 1)).astype(np.int64)


def _speed_ups(h200: Hardware) -> Iterator[dict[str, Any]]:
    llep = LLEP(capacity_factor=_LLEP_CAPACITY, least_imbalance=_LLEP_LEAST_IMBALANCE)
    machine = replace(h200, kernel=KernelName.LOOP.value)  # both computed one expert after the other
    for seen in published.SPEED_UPS:
        work = seen.shape.work(seen.num_tokens)
        for share, value in seen.values.items():
            counts = _hot_counts(seen, share)
            plan_s = _LLEP_PLAN_S_PER_EXPERT * seen.shape.num_experts if share else 0.0
            static_s, llep_s = (_layer_s(p, machine, work, counts, s) for p, s in ((StaticEP(), 0.0), (llep, plan_s)))
            fitted = seen.model == published.FITTED_MODEL
            yield _row("llep", seen.model, "speed-up", published.LLEP, fitted, value, static_s / llep_s)


def _hot_counts(seen: SpeedUps, share: float) -> IntArray:
    """Return int64 ``[8, num_experts]``: a share of the tokens goes to the hot experts alike, the rest at random."""
    num_experts, num_hot = seen.shape.num_experts, seen.num_hot
    num_assignments = seen.num_tokens * seen.shape.top_k
    shares = np.full(num_experts, 1 / num_experts)
    if share:
        shares[:num_hot] = share / num_hot
        shares[num_hot:] = (1 - share) / (num_experts - num_hot)
    rng = np.random.default_rng(0)
    return np.stack([rng.multinomial(num_assignments, shares) for _ in range(_WORLD_SIZE)]).astype(np.int64)


def _layer_s(policy: Policy, hardware: Hardware, work: ModelWork, counts: IntArray, plan_s: float) -> float:
    """Return the median time of one layer of so many experts and tokens."""
    cost = CostModel(hardware, Topology(hardware, len(counts)), work, SoftwareCost(plan_s=plan_s))
    system = SimulatedSystem(policy.calibrated(cost.expert), cost, jitter=Jitter(hardware, len(counts), seed=0))
    times = []
    for index in range(_ROUNDS):
        system.begin_round("closed", index)
        times.append(float(system.run([counts]).end_s.max()))
    return median(times)
