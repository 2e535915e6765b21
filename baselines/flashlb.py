"""FlashLB: how many replicas experts get and where they go are decided together, and only where it is worth it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.replicas import FloatArray, PeriodicPolicy
from harmoeny.compiled import compiled
from harmoeny.packing import copies_by_load, longest_first, renumber
from harmoeny.placement import BoolArray, IntArray, Placement

#: Experts that may take, and that may give a replica, tried with each other.
_CANDIDATES = 6


@dataclass(kw_only=True)
class FlashLB(PeriodicPolicy):
    """The balancer of vllm-ascend that chooses replica counts by what packing makes of them.

    EPLB gives replicas to the heaviest share, one by one, without a look at how they can be packed. Here replicas move
    from expert to expert as long as packing them gets more even.

    Attributes:
        window: latest batches whose counts are added up as the expected load.
        interval: batches between two looks at it; the first follows the first batch.
        least_imbalance: a placement that promises less, largest load over mean, is kept.
    """

    name: ClassVar[str] = "flashlb"
    description: ClassVar[str] = "replicas and their places chosen together, where the present ones are not good enough"

    window: int = 32
    least_imbalance: float = 1.15

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number that is too small.
        """
        super().validate()
        self._at_least(least_imbalance=1)

    def rearranged(self, load: IntArray | FloatArray, placement: Placement, num_slots: int) -> Placement | None:
        """Return new replicas for the load, or None where the present ones promise less than ``least_imbalance``."""
        resident, load = placement.resident, load.astype(np.float64)
        largest = float(((load / resident.sum(axis=1))[:, None] * resident).sum(axis=0).max())
        if largest * placement.world_size <= self.least_imbalance * load.sum():
            return None
        found = renumber(place_jointly(load, placement.world_size, num_slots), resident)
        return Placement(home=found.argmax(axis=1), resident=found)


@compiled
def place_jointly(load: FloatArray, num_ranks: int, num_slots: int) -> BoolArray:
    """Move replicas between experts as long as the packing becomes more even, the best move first, then the best two.

    Those with the largest shares get a replica from those whose shares are smallest after giving one. It starts from
    EPLB's numbers, so it never ends with more than these packed in this way.

    Args:
        load: float64 ``[num_experts]``.
        num_ranks: number of ranks.
        num_slots: experts that every rank holds, at most ``num_experts``.

    Returns:
        bool ``[num_experts, num_ranks]``, ``num_slots`` true per rank.
    """
    copies = copies_by_load(load, num_ranks * num_slots, num_ranks)
    resident, rank_load = longest_first(load, copies, num_ranks, num_slots)
    while True:
        shares = np.where(copies < num_ranks, load / copies, -1.0)
        takers = np.argsort(-shares, kind="mergesort")[:_CANDIDATES]
        after_giving = np.where(copies > 1, load / np.maximum(copies - 1, 1), np.inf)
        givers = np.argsort(after_giving, kind="mergesort")[:_CANDIDATES]
        moves = [(-1, -1)] + [(taker, giver) for taker in takers for giver in givers if taker != giver]
        best = copies
        for first in range(len(moves)):
            if best is not copies:
                break  # one move is enough
            for second in range(1, len(moves)):
                if first > 0 and second <= first:
                    continue
                tried = copies.copy()
                for taker, giver in (moves[first], moves[second]):
                    if taker >= 0:
                        tried[taker] += 1
                        tried[giver] -= 1
                if tried.min() < 1 or tried.max() > num_ranks:
                    continue
                found, reached = longest_first(load, tried, num_ranks, num_slots)
                if _more_even(reached, rank_load):
                    resident, rank_load, best = found, reached, tried
        if best is copies:
            return resident
        copies = best


@compiled
def _more_even(one: FloatArray, other: FloatArray) -> bool:
    """Tell whether the largest load is smaller, or as large and the loads' squares sum to less."""
    margin = 1e-9 * other.max()
    if abs(one.max() - other.max()) > margin:
        return bool(one.max() < other.max())
    return bool((one * one).sum() < (other * other).sum() * (1 - 1e-9))
