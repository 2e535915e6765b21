"""What ranks execute before the plan is known, and how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np

from experiments.routers.base import FloatArray
from experiments.simulator.cost import CostModel
from harmoeny.head_start import early_of_all
from harmoeny.placement import IntArray, Placement
from harmoeny.policy import Policy

#: Finding out what all ranks execute early: a call, and for every rank and expert (timed on an AMD EPYC).
_CHOICE_S, _CHOICE_CELL_S = 5e-6, 1.4e-9


@dataclass(frozen=True)
class Early:
    """A layer's early rows.

    Attributes:
        executed: int64 ``[num_experts, world_size]``, assignments.
        seconds: float64 ``[world_size]``, how long ranks execute them, from the end of routing on.
        choice_s: what a host takes to find out which they are, once all counts are there.
        add_s: float64 ``[world_size]``, adding what came of them to what comes of the rest, at the end of the layer.
    """

    executed: IntArray
    seconds: FloatArray
    choice_s: float
    add_s: FloatArray

    @classmethod
    def of(
        cls,
        policy: Policy,
        counts: IntArray,
        placement: Placement,
        cost: CostModel,
        pace: Callable[[IntArray], FloatArray],
    ) -> Self:
        """Let a policy choose.

        Args:
            policy: the policy.
            counts: int64 ``[world_size, num_experts]``, the batch.
            placement: the residency before it.
            cost: the cost model.
            pace: tells of int64 ``[num_stages, num_experts, world_size]``, executed rows, how many times as long every
                rank takes for them as the cost model says.
        """
        early = early_of_all(counts, placement.routed.resident, policy.begin_early(placement.routed))
        if early is None:
            none = np.zeros(len(counts))
            return cls(np.zeros_like(placement.resident, dtype=np.int64), none, 0.0, none)
        executed = np.ascontiguousarray(early.T)
        rows, stages = early.sum(axis=1), executed[None]
        seconds = (cost.copy_s(rows) + cost.experts_s(stages)) * pace(stages) + (rows > 0) * cost.expert.early_s
        # Results and what comes of the rest are read, and their sums written.
        return cls(executed, seconds, _CHOICE_S + _CHOICE_CELL_S * early.size, 1.5 * cost.copy_s(rows))
