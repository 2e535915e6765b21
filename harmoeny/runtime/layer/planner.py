"""Plans one system's batches on one rank: its policy, its present placements, and what it has seen."""

from __future__ import annotations

from dataclasses import dataclass, field

from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.runtime.memory.fetch.base import FetchStrategy


@dataclass
class Planner:
    """The planning side of a system on one rank.

    Attributes:
        policy: makes the plans.
        placements: the present residency per MoE layer.
        fetcher: this rank's expert memory, which follows the placements.
        history: int64 ``[world_size, num_experts]`` per MoE layer and earlier batch, for policies that place anew.
    """

    policy: Policy
    placements: list[Placement]
    fetcher: FetchStrategy
    history: list[list[IntArray]] = field(init=False)

    def __post_init__(self) -> None:
        self.history = [[] for _ in self.placements]
        self._places_anew = type(self.policy).update_placement is not Policy.update_placement

    def plan(self, layer: int, counts: IntArray, rank: int) -> Plan:
        """Plan a batch, after the policy had its chance to place its experts anew.

        Args:
            layer: MoE layer in order of execution.
            counts: int64 ``[world_size, num_experts]``.
            rank: this rank.
        """
        if self._places_anew:
            changed = self.policy.update_placement(layer, self.history[layer], self.placements[layer])
            self.history[layer].append(counts)
            if changed is not None:
                self.placements[layer] = changed
                self.fetcher.replace_residents(layer, changed.resident[:, rank])
        return self.policy.plan(counts, self.placements[layer])
