"""Plans one system's batches on one rank: its policy, its present placements, and what it has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from harmoeny.head_start import HeadStart, early_of_all
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.runtime.layer.residency import Residency
from harmoeny.runtime.memory.fetch.base import FetchStrategy
from harmoeny.shared import make_plan

#: Looks at a layer's plan before it is carried out: (layer, counts, what makes the plan).
PlanGuard = Callable[[int, IntArray, Callable[[], Plan]], Plan]


class Planner:
    """The planning side of a system on one rank.

    Attributes:
        policy: makes the plans.
        placements: the present residency per MoE layer.
        fetcher: this rank's expert memory, which follows the placements.
        guard: is asked for every plan, if there is one; for checks, never while anything is timed.
    """

    def __init__(self, policy: Policy, placements: list[Placement], fetcher: FetchStrategy) -> None:
        self.policy, self.fetcher = policy, fetcher
        self._residency = Residency(policy, placements)
        self.placements = self._residency.placements
        self.guard: PlanGuard | None = None
        self._head_starts: dict[int, tuple[Placement, HeadStart | None]] = {}

    @property
    def places_anew(self) -> bool:
        """Whether the policy may change its placements from batch to batch."""
        return self._residency.changes

    def reset(self) -> None:
        """Forget all batches: placements and residents are those of a system that has seen none."""
        self._residency.reset()
        self.fetcher.reset()

    def rehearse(self, num_batches: int) -> None:
        """Have whatever planning so many batches takes compiled and loaded; nothing is remembered of it."""
        self._residency.rehearse(num_batches)

    def head_start(self, layer: int) -> HeadStart | None:
        """Return how much ranks execute of a layer before it is planned; the policy is asked once per placement."""
        placement = self.placements[layer]
        asked = self._head_starts.get(layer)
        if asked is None or asked[0] is not placement:
            asked = self._head_starts[layer] = placement, self.policy.begin_early(placement.routed)
        return asked[1]

    def early(self, layer: int, counts: IntArray) -> IntArray | None:
        """Return int64 ``[world_size, num_experts]``, what all ranks execute before :meth:`plan`, or None for nothing.

        Args:
            layer: MoE layer in order of execution, which is not planned yet.
            counts: int64 ``[world_size, num_experts]``.
        """
        return early_of_all(counts, self.placements[layer].routed.resident, self.head_start(layer))

    def plan(self, layer: int, counts: IntArray, early: IntArray | None = None) -> Plan:
        """Plan a batch, after the policy had its chance to place its experts anew.

        Args:
            layer: MoE layer in order of execution.
            counts: int64 ``[world_size, num_experts]``.
            early: int64, likewise, what of it is executed already; None: nothing.
        """
        if self.guard is None:
            plan = self._plan(layer, counts, early)
        else:
            plan = self.guard(layer, counts, lambda: self._plan(layer, counts, early))
        retained = self._residency.retain(layer)
        if retained is not None:
            self.fetcher.retain(retained)
        return plan

    def _plan(self, layer: int, counts: IntArray, early: IntArray | None) -> Plan:
        changed = self._residency.update(layer, counts)
        if changed is not None:
            self.fetcher.replace_residents(layer, changed)
        plan = make_plan(self.policy, counts if early is None else counts - early, self.placements[layer])
        ahead = self._residency.look_ahead(layer, counts)
        if ahead is not None:
            self.fetcher.replace_residents(layer + 1, ahead, ahead=True)
        return plan if early is None else replace(plan, early=early)
