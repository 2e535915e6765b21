"""HybriMoE: a batch's experts are shared out over host, device and the link between them, by simulating all three."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.ahead import PrefetchingCache
from baselines.kit.with_host import WithHost
from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, FloatArray, IntArray, Placement, hold_fetched, hold_highest
from harmoeny.places import PlaceCosts, device_slice_s, host_slice_s, places_end_s, spare_copies
from harmoeny.plan import home_executed

#: Scores that weigh less than this are forgotten.
_LEAST_WEIGHT = 1e-3


@dataclass(kw_only=True)
class HybriMoE(WithHost, PrefetchingCache):
    """Hybrid CPU-GPU inference (HybriMoE, DAC 2025, arXiv 2504.05897; github.com/PKU-SEC-Lab/HybriMoE).

    Experts stand in a row: those in slots with the most tokens first, then the others likewise. The device takes from
    its head and the host from its tail, whoever would be done first, so that each takes from the other's where it would
    be idle. What the device lacks travels over the link first.

    A fetched expert takes the slot of the one with the least score: the mean of the shares of tokens that it had, which
    decays from batch to batch (MRS).

    While a layer computes, experts that the next one is predicted to need are copied in, one after the other: each is
    the one whose presence makes the next layer's simulated end soonest.

    Attributes:
        decay: weight of the latest batch in the scores, the authors' alpha.
        top_p: experts with the most tokens of a batch, whose shares count, and among which prefetches are chosen.
        prefetch: whether anything is copied in ahead.
        schedule: whether timelines share the experts out; else the host executes all that is in no slot, as without
            HybriMoE.
        cache: whether slots follow the scores; else they keep what they hold but for what is copied in ahead. Without
            ``schedule`` misses are copied in behind the batch, those with the highest scores and no more than the link
            brings meanwhile.
    """

    name: ClassVar[str] = "hybrimoe"
    description: ClassVar[str] = (
        "shares a batch's experts out over host, device and link, and caches by decaying scores"
    )

    decay: float = 0.5
    top_p: int = 12
    prefetch: bool = True
    schedule: bool = True
    cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        #: Scores of every layer's experts after its latest batch. No option.
        self._scores: dict[int, FloatArray] = {}

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

    def on_host(self, executed: IntArray, placement: Placement) -> BoolArray:
        """Return what the hosts take of every rank's row of experts.

        Raises:
            ValueError: the policy was not calibrated.
        """
        costs = self.costs()
        if not self.schedule:
            return (executed > 0) & ~placement.resident
        return take_from_both_ends(executed, placement.resident, costs)

    @property
    def calibration_batches(self) -> int:
        """Batches that say what follows what, where anything is copied in ahead."""
        return super().calibration_batches if self.prefetch else 0

    def look_ahead(self, layer: int, counts: IntArray, following: Placement) -> Placement | None:
        """Copy experts into the next layer's slots for as long as its simulated end gets sooner by that.

        No more than the link brings while the devices execute the layer's experts.

        Args:
            layer: the layer that was planned.
            counts: int64 ``[world_size, num_experts]``, its counts.
            following: the present residency of the next layer.
        """
        expected = self.expected(layer, counts)
        if self.num_slots is None or not self.prefetch or self._costs is None or expected is None:
            return None
        executed = home_executed(np.ceil(expected).astype(np.int64)[None], following)
        scores = self._scores.get(layer + 1, np.zeros(len(expected)))
        resident = prefetched(
            executed, scores, following.resident, self.num_slots, self.top_p, counts.sum(axis=0), self._costs
        )
        return following.with_residents(resident)

    def retain(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:
        """Keep what ranks fetched, in place of the least scores."""
        if self.num_slots is None:
            return None
        self._scores[layer] = scores = self.scores([counts.sum(axis=0) for counts in history[-self.history_window :]])
        if not self.cache:
            return None
        executed = home_executed(history[-1], placement)
        host = self.on_host(executed, placement)
        if not self.schedule:
            idle = np.ones(executed.shape[1])
            copies = spare_copies(executed, placement.resident, host, self.costs(), idle, len(history) + layer)
            behind = hold_highest(scores, host, copies)
            return placement.with_residents(hold_highest(scores, placement.resident | behind, self.num_slots))
        fetched = (executed > 0) & ~placement.resident & ~host
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


@compiled
def prefetched(
    executed: IntArray,
    scores: FloatArray,
    resident: BoolArray,
    num_slots: int,
    most_tried: int,
    counts: IntArray,
    costs: PlaceCosts,
) -> BoolArray:
    """Choose what ranks hold of the next layer, by the gain of every expert that is predicted to be needed.

    Args:
        executed: int64 ``[num_experts, world_size]``, assignments that ranks are predicted to execute.
        scores: float64 ``[num_experts]``; of what is not needed the least is overwritten.
        resident: bool ``[num_experts, world_size]``, what they hold.
        num_slots: slots of a rank.
        most_tried: experts with the most assignments that are tried.
        counts: int64 ``[num_experts]``, assignments of the layer before, behind whose execution is copied.
        costs: the machine's.

    Returns:
        bool ``[num_experts, world_size]``.
    """
    num_experts, world_size = resident.shape
    held = resident.copy()
    device_s = 0.0
    for expert in range(num_experts):
        if counts[expert] > 0:
            device_s += device_slice_s(counts[expert], costs) / world_size
    for rank in range(world_size):
        wanted = np.argsort(-executed[:, rank], kind="mergesort")[:most_tried]
        for _ in range(int(device_s / costs.fetch_s)):
            best, best_s = -1, _simulated_s(executed, held, rank, costs)
            for expert in wanted:
                if executed[expert, rank] == 0 or held[expert, rank]:
                    continue
                held[expert, rank] = True
                end_s = _simulated_s(executed, held, rank, costs)
                held[expert, rank] = False
                if end_s < best_s:
                    best, best_s = expert, end_s
            least = -1
            for expert in range(num_experts):
                unneeded = held[expert, rank] and executed[expert, rank] == 0
                if unneeded and (least < 0 or scores[expert] < scores[least]):
                    least = expert
            full = held[:, rank].sum() >= num_slots
            if best < 0 or (full and least < 0):
                break
            if full:
                held[least, rank] = False
            held[best, rank] = True
    return held


@compiled
def _simulated_s(executed: IntArray, held: BoolArray, rank: int, costs: PlaceCosts) -> float:
    """Return when a rank is done with what it executes, by the schedule that it would make."""
    own, there = executed[:, rank : rank + 1], held[:, rank : rank + 1]
    host = take_from_both_ends(own, there, costs)[:, 0]
    active = np.flatnonzero(own[:, 0])
    active = active[np.argsort(-own[active, 0], kind="mergesort")]
    return places_end_s(own[active, 0], there[active, 0], host[active], costs)
