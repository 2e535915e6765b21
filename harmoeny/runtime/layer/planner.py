"""Plans one system's batches on one rank: its policy, its present placements, and what it has seen."""

from __future__ import annotations

from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.runtime.layer.residency import Residency
from harmoeny.runtime.memory.fetch.base import FetchStrategy


class Planner:
    """The planning side of a system on one rank.

    Attributes:
        policy: makes the plans.
        placements: the present residency per MoE layer.
        fetcher: this rank's expert memory, which follows the placements.
    """

    def __init__(self, policy: Policy, placements: list[Placement], fetcher: FetchStrategy) -> None:
        self.policy, self.fetcher = policy, fetcher
        self._residency = Residency(policy, placements)
        self.placements = self._residency.placements

    def plan(self, layer: int, counts: IntArray, rank: int) -> Plan:
        """Plan a batch, after the policy had its chance to place its experts anew.

        Args:
            layer: MoE layer in order of execution.
            counts: int64 ``[world_size, num_experts]``.
            rank: this rank.
        """
        changed = self._residency.update(layer, counts)
        if changed is not None:
            self.fetcher.replace_residents(layer, changed.resident[:, rank])
        return self.policy.plan(counts, self.placements[layer])
