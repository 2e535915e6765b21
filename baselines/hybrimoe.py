"""HybriMoE: a batch's experts are shared out over host, device and the link between them, by simulating all three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np

from baselines.kit.cache import CachePolicy
from harmoeny.compiled import compiled
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, IntArray, Placement, hold_fetched
from harmoeny.places import PlaceCosts, device_slice_s, host_slice_s
from harmoeny.plan import home_executed
from harmoeny.predict import FloatArray

#: Scores that weigh less than this are forgotten.
_LEAST_WEIGHT = 1e-3


@dataclass(kw_only=True)
class HybriMoE(CachePolicy):
    """Hybrid CPU-GPU inference (HybriMoE, DAC 2025, arXiv 2504.05897; github.com/PKU-SEC-Lab/HybriMoE).

    Experts stand in a row: those in slots with the most tokens first, then the others likewise. The device takes from
    its head and the host from its tail, whoever would be done first, so that each takes from the other's where it would
    be idle. What the device lacks travels over the link first.

    A fetched expert takes the slot of the one with the least score: the mean of the shares of tokens that it had, which
    decays from batch to batch (MRS).

    Attributes:
        decay: weight of the latest batch in the scores, the authors' alpha.
        top_p: experts with the most tokens of a batch, whose shares count.
    """

    name: ClassVar[str] = "hybrimoe"
    description: ClassVar[str] = (
        "shares a batch's experts out over host, device and link, and caches by decaying scores"
    )

    decay: float = 0.5
    top_p: int = 12

    def __post_init__(self) -> None:
        #: Known once the policy is calibrated. No option.
        self._costs: PlaceCosts | None = None

    @property
    def needs_host(self) -> bool:
        """True."""
        return True

    @property
    def history_window(self) -> int:
        """Batches whose scores count."""
        return 1 + int(np.ceil(np.log(_LEAST_WEIGHT) / np.log1p(-self.decay))) if self.decay < 1 else 1

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a weight that is none, or a number below 1.
        """
        super().validate()
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay: {self.decay}, must be above 0 and at most 1")
        if self.top_p < 1:
            raise ValueError(f"top_p: {self.top_p}, must be at least 1")

    def calibrated(self, cost: ExpertCost) -> Self:
        """Return the policy with the machine's costs in place of the authors' constants."""
        calibrated = replace(self)
        calibrated._costs = PlaceCosts.of(cost)
        return calibrated

    def on_host(self, executed: IntArray, placement: Placement) -> BoolArray:
        """Return what the hosts take of every rank's row of experts.

        Raises:
            ValueError: the policy was not calibrated.
        """
        if self._costs is None:
            raise ValueError("hybrimoe: must be calibrated before planning")
        return take_from_both_ends(executed, placement.resident, self._costs)

    def retain(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:  # noqa: ARG002
        """Keep what ranks fetched, in place of the least scores."""
        if self.num_slots is None:
            return None
        executed = home_executed(history[-1], placement)
        fetched = (executed > 0) & ~self.on_host(executed, placement)
        scores = self.scores([counts.sum(axis=0) for counts in history[-self.history_window :]])
        fetched &= ~placement.resident
        return placement.with_residents(hold_fetched(scores, fetched, placement, self.num_slots))

    def scores(self, totals: Sequence[IntArray]) -> FloatArray:
        """Return float64 ``[num_experts]``; ``totals``: int64 ``[num_experts]`` per batch, oldest first."""
        scores = np.zeros(len(totals[-1]))
        for total in totals:
            share = total / max(int(total.sum()), 1)
            share[np.argsort(-share, kind="stable")[self.top_p :]] = 0.0
            scores = self.decay * share + (1 - self.decay) * scores
        return scores


@compiled
def take_from_both_ends(executed: IntArray, resident: BoolArray, costs: PlaceCosts) -> BoolArray:
    """Share every rank's experts out over its device and its host.

    Args:
        executed: int64 ``[num_experts, world_size]``, assignments that every rank executes.
        resident: bool ``[num_experts, world_size]``, what is in its slots.
        costs: the machine's.

    Returns:
        bool ``[num_experts, world_size]``, what hosts execute.
    """
    num_experts, world_size = executed.shape
    host = np.zeros((num_experts, world_size), dtype=np.bool_)
    for rank in range(world_size):
        active = np.flatnonzero(executed[:, rank])
        above = executed[:, rank].max() * resident[:, rank]
        row = active[np.argsort(-(executed[:, rank] + above)[active], kind="mergesort")]
        head, tail = 0, len(row) - 1
        device_s, link_s, host_s = 0.0, 0.0, costs.host_trip_s
        while head <= tail:
            expert, last = row[head], row[tail]
            ready_s, there_s = device_s, link_s
            if not resident[expert, rank]:
                there_s += costs.fetch_s
                ready_s = max(ready_s, there_s)
            ready_s += device_slice_s(executed[expert, rank], costs)
            host_end_s = host_s + host_slice_s(executed[last, rank], costs)
            if ready_s <= host_end_s:
                device_s, link_s, head = ready_s, there_s, head + 1
            else:
                host_s, tail = host_end_s, tail - 1
                host[last, rank] = True
    return host
