"""UltraEP: in every batch, just enough replicas that no rank executes more than a threshold, which is searched for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from harmoeny.choices import Fetch
from harmoeny.compiled import compiled
from harmoeny.placement import IntArray, Placement, even_room
from harmoeny.plan import Plan, home_executed, plan_from_tokens, tokens_of_shares
from harmoeny.policy import Policy


@dataclass(kw_only=True)
class UltraEP(Policy):
    """UltraEP's quota planner (arXiv 2606.04101): the least threshold on the load that a greedy oracle can keep.

    Every rank has spare slots. For a threshold, the oracle lets the ranks above it export to the ranks below it,
    one expert to one slot at a time; where it fails, the threshold is too low. What an expert's home keeps and what
    its replicas get are quotas, which every rank fills with its own assignments first.

    Attributes:
        spare_slots: experts that a rank can import in a batch, and has memory for.
        least_threshold: lower bound of the threshold, in multiples of the even load.
        min_tokens_per_replica: a replica gets no less; null: what a source has to give, over the slots that may take
            it.
    """

    name: ClassVar[str] = "ultraep"
    description: ClassVar[str] = "imports experts in every batch until no rank is above the least feasible threshold"

    fetch: str = Fetch.PEER.value
    spare_slots: int = 2
    least_threshold: float = 1.0
    min_tokens_per_replica: int | None = None

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number that is too small.
        """
        super().validate()
        if self.spare_slots < 0:
            raise ValueError(f"spare_slots: {self.spare_slots}, must be at least 0")
        if not self.least_threshold >= 1:
            raise ValueError(f"least_threshold: {self.least_threshold}, must be at least 1, the even load")
        if self.min_tokens_per_replica is not None and self.min_tokens_per_replica < 1:
            raise ValueError(f"min_tokens_per_replica: {self.min_tokens_per_replica}, must be at least 1, or null")

    def room(self, num_experts: int, world_size: int) -> int | None:
        """Return the experts that a rank has room for: its own and the spare slots, unless it is set."""
        if self.num_slots is not None or self.fetch == Fetch.NONE:
            return self.num_slots
        return even_room(num_experts, world_size, self.spare_slots)

    def with_spare_slots(self, spare_slots: int, num_experts: int, world_size: int) -> Self:  # noqa: ARG002
        """Return the policy with so many spare slots on every rank."""
        return replace(self, spare_slots=spare_slots)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Export ``counts`` (int64 ``[world_size, num_experts]``) above the threshold to where there is room."""
        return plan_from_tokens(tokens_of_shares(counts, self.executed(counts, placement)), placement)

    def executed(self, counts: IntArray, placement: Placement) -> IntArray:
        """Return int64 ``[num_experts, world_size]``, the quotas."""
        quotas = home_executed(counts, placement)
        exports = find_exports(
            quotas, placement.home, self.spare_slots, self.least_threshold, self.min_tokens_per_replica or 0
        )
        experts, receivers, amounts = exports.T
        np.subtract.at(quotas, (experts, placement.home[experts]), amounts)
        np.add.at(quotas, (experts, receivers), amounts)
        return quotas


#: A threshold is accepted at once this much above the least one, in percent; and how often it is raised by one percent
#: of the largest load before it is searched for.
_MARGIN = 1
_RAISES = 4


@compiled
def find_exports(
    at_home: IntArray, home: IntArray, spare_slots: int, least_threshold: float, least_tokens: int
) -> IntArray:
    """Find the least threshold that the oracle can keep, and return its exports.

    Args:
        at_home: int64 ``[num_experts, world_size]``, loads at the home ranks, 0 elsewhere.
        home: int64 ``[num_experts]``.
        spare_slots: experts that a rank can import.
        least_threshold: lower bound in multiples of the even load.
        least_tokens: of an export; 0: as the oracle chooses.

    Returns:
        int64 ``[num_exports, 3]``: expert, receiver and number of tokens.
    """
    world_size = at_home.shape[1]
    expert_load = at_home.sum(axis=1)
    load = at_home.sum(axis=0)
    order = np.argsort(-expert_load, kind="mergesort")  # of the experts
    low = int(np.ceil(load.sum() / world_size * least_threshold))
    high = max(load.max(), low)
    threshold = min(high, low + (low * _MARGIN + 99) // 100)
    failed = low - 1
    for _ in range(_RAISES + 1):
        exports, feasible = keep_threshold(expert_load, load, home, order, spare_slots, threshold, least_tokens)
        if feasible:
            break
        failed = threshold
        threshold = min(high, threshold + max(1, (high + 99) // 100))
    if not feasible:
        threshold = high  # at which nobody exports
        exports = exports[:0]
    if failed >= low:  # below it, the margin is good enough
        while threshold - failed > 1:
            middle = (threshold + failed) // 2
            found, feasible = keep_threshold(expert_load, load, home, order, spare_slots, middle, least_tokens)
            if feasible:
                threshold, exports = middle, found
            else:
                failed = middle
    return exports


@compiled
def keep_threshold(
    expert_load: IntArray,
    load: IntArray,
    home: IntArray,
    order: IntArray,
    spare_slots: int,
    threshold: int,
    least_tokens: int,
) -> tuple[IntArray, bool]:
    """Let ranks above a threshold export until none is: the most loaded rank first, its most popular expert first.

    Every export goes to the rank with the most room that has a free slot and not that expert yet.

    Args:
        expert_load: int64 ``[num_experts]``.
        load: int64 ``[world_size]``, everything at home.
        home: int64 ``[num_experts]``.
        order: int64 ``[num_experts]``, experts by falling load.
        spare_slots: experts that a rank can import.
        threshold: what a rank may execute, at least the even load.
        least_tokens: an export of fewer is not made; 0: of fewer than what its rank has to give, over the slots that
            may take it.

    Returns:
        int64 ``[num_exports, 3]``: expert, receiver and number of tokens, and whether all ranks keep the threshold.
    """
    world_size = load.shape[0]
    slack = np.maximum(threshold - load, 0)
    free = np.full(world_size, spare_slots, dtype=np.int64)
    exports = np.empty((world_size * spare_slots, 3), dtype=np.int64)
    num_exports = 0
    for source in np.argsort(-load, kind="mergesort"):
        need = load[source] - threshold
        if need <= 0:
            break
        for expert in order:
            if need <= 0 or expert_load[expert] == 0:
                break
            if home[expert] != source:
                continue
            available = expert_load[expert]
            first = num_exports
            while need > 0 and available > 0:
                target = -1
                slots = 0
                for rank in range(world_size):
                    if slack[rank] == 0 or free[rank] == 0:
                        continue
                    slots += free[rank]
                    if target >= 0 and slack[rank] <= slack[target]:
                        continue
                    if not (exports[first:num_exports, 1] == rank).any():
                        target = rank
                if target < 0:
                    break
                amount = min(need, slack[target], available)
                least = least_tokens if least_tokens > 0 else (need + slots - 1) // slots
                if amount < least:
                    break
                exports[num_exports] = (expert, target, amount)
                num_exports += 1
                need -= amount
                available -= amount
                slack[target] -= amount
                free[target] -= 1
        if need > 0:
            return exports[:num_exports], False
    return exports[:num_exports], True
