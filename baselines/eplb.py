"""EPLB: replicas of heavy experts, packed onto the ranks from the statistics of recent batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.replicas import FloatArray, PeriodicPolicy
from harmoeny.compiled import compiled
from harmoeny.packing import renumber
from harmoeny.placement import BoolArray, IntArray, Placement


@dataclass(kw_only=True)
class EPLB(PeriodicPolicy):
    """DeepSeek's expert-parallel load balancer (arXiv 2412.19437, section 3.4; README of deepseek-ai/EPLB).

    The first batch shows where the load is; after it, and then every ``interval`` batches, replicas are chosen and
    packed anew.

    Attributes:
        window: number of latest batches whose counts are added up as the expected load.
        interval: batches between two re-placements.
        num_nodes: with more than one, the hierarchical mode: experts stay on the node of their group.
        num_groups: groups of consecutive experts for the hierarchical mode, a multiple of ``num_nodes``.
    """

    name: ClassVar[str] = "eplb"
    description: ClassVar[str] = "replicas of heavy experts, re-placed every few batches from recent statistics"

    num_nodes: int = 1
    num_groups: int = 1

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number that is too small, or groups that the nodes do not divide.
        """
        super().validate()
        self._at_least(num_nodes=1, num_groups=1)
        if self.num_groups % self.num_nodes:
            raise ValueError(
                f"num_groups: {self.num_groups}, must be a multiple of num_nodes={self.num_nodes} "
                "(num_nodes=1 gives the global mode)"
            )

    def held(self, num_experts: int, world_size: int) -> int:
        """Return the experts that every rank holds, never more than the experts of its node.

        Raises:
            ValueError: nodes or groups that do not fit the layer, or fewer slots.
        """
        if world_size % self.num_nodes:
            raise ValueError(f"num_nodes: {self.num_nodes}, must divide world_size={world_size}")
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups: {self.num_groups}, must divide num_experts={num_experts}")
        return min(super().held(num_experts, world_size), num_experts // self.num_nodes)

    def rearranged(self, load: IntArray | FloatArray, placement: Placement, num_slots: int) -> Placement:
        """Return new replicas for the load."""
        whole = load.astype(np.int64)
        resident = balance(whole, placement.resident, num_slots, self.num_nodes, self.num_groups)
        return Placement(home=resident.argmax(axis=1), resident=resident)


def balance(load: IntArray, present: BoolArray, num_slots: int, num_nodes: int, num_groups: int) -> BoolArray:
    """Choose replicas and pack them: groups onto nodes, then inside every node replicas onto ranks.

    The largest expected load of a rank is at most ``2 - 1 / ranks per node`` times the best possible on its node; see
    :func:`pack`. With one node this is the global mode, and the factor is to the best placement of all.

    Args:
        load: int64 ``[num_experts]``, expected assignments.
        present: bool ``[num_experts, world_size]``, the present residency; ranks and nodes are numbered such that much
            of it stays.
        num_slots: experts that every rank holds.
        num_nodes: divides ``num_groups`` and the number of ranks.
        num_groups: divides the number of experts; a group is a run of consecutive ones.

    Returns:
        bool ``[num_experts, world_size]``, ``num_slots`` true per rank.
    """
    num_experts, world_size = present.shape
    group_size, ranks = num_experts // num_groups, world_size // num_nodes
    group_load = load.reshape(num_groups, group_size).sum(axis=1)
    on_node = pack(group_load, np.ones(num_groups, dtype=np.int64), num_nodes).repeat(group_size, axis=0)
    present_nodes = np.logical_or.reduce(present.reshape(num_experts, num_nodes, ranks), axis=2).astype(np.bool_)
    on_node = renumber(on_node, present_nodes)
    resident = np.zeros_like(present)
    for node in range(num_nodes):
        experts = np.flatnonzero(on_node[:, node])
        own = slice(node * ranks, (node + 1) * ranks)
        copies = replicate(load[experts], num_slots * ranks, ranks)
        resident[experts, own] = renumber(pack(load[experts], copies, ranks), present[experts, own])
    return resident


@compiled
def replicate(load: IntArray, num_replicas: int, max_copies: int) -> IntArray:
    """Give every replica beyond the first to the expert whose replicas carry most; this minimises the largest of them.

    Args:
        load: int64 ``[num_experts]``.
        num_replicas: replicas of all experts together, ``num_experts`` to ``num_experts * max_copies``.
        max_copies: most replicas of one expert.

    Returns:
        int64 ``[num_experts]``, replicas of every expert, at least 1.
    """
    num_experts = load.shape[0]
    copies = np.ones(num_experts, dtype=np.int64)
    for _ in range(num_replicas - num_experts):
        heaviest = -1
        for expert in range(num_experts):
            if copies[expert] < max_copies and (
                heaviest < 0 or load[expert] * copies[heaviest] > load[heaviest] * copies[expert]
            ):
                heaviest = expert
        copies[heaviest] += 1
    return copies


def pack(load: IntArray, copies: IntArray, num_ranks: int) -> BoolArray:
    """Pack replicas onto ranks: as many on every rank, those of one expert on different ranks, loads balanced.

    The replicas are dealt out heaviest first; then the most loaded rank swaps replicas with others as long as that
    lowers the larger of the two loads. At the end no two replicas of the most and the least loaded rank can be swapped
    with gain. As both hold equally many, these loads then differ by at most one replica's load, so the largest load is
    at most ``2 - 1 / num_ranks`` times the best possible, which is neither below the mean nor below any replica's load.

    Args:
        load: int64 ``[num_experts]``, shared evenly by the replicas of an expert.
        copies: int64 ``[num_experts]``, replicas of every expert, 1 to ``num_ranks``; ``num_ranks`` divides their sum.
        num_ranks: number of ranks.

    Returns:
        bool ``[num_experts, num_ranks]``, true where a rank holds the expert.
    """
    weight = load / copies
    heaviest_first = np.argsort(-weight, kind="stable")
    # The replicas of one expert follow each other, so dealing in turn puts them on different ranks.
    dealt = np.repeat(heaviest_first, copies[heaviest_first])
    slots = dealt.reshape(-1, num_ranks).T.copy()
    resident = np.zeros((len(load), num_ranks), dtype=np.bool_)
    resident[slots, np.arange(num_ranks)[:, None]] = True
    _swap(slots, resident, weight)
    return resident


@compiled
def _swap(slots: IntArray, resident: BoolArray, weight: FloatArray) -> None:
    """Lower the largest load by the best swap of the most loaded rank, until none helps.

    Args:
        slots: int64 ``[num_ranks, num_slots]``, the expert in every slot; updated.
        resident: bool ``[num_experts, num_ranks]``, the same; updated.
        weight: float64 ``[num_experts]``, load of one replica.
    """
    num_ranks, num_slots = slots.shape
    load = np.zeros(num_ranks)
    for rank in range(num_ranks):
        for expert in slots[rank]:
            load[rank] += weight[expert]
    least_gain = 1e-9 * load.max()
    while True:
        high = load.argmax()
        largest, low, give, take = load[high] - least_gain, -1, -1, -1
        for rank in range(num_ranks):
            for i in range(num_slots):
                for j in range(num_slots):
                    x, y = slots[high, i], slots[rank, j]
                    gain = weight[x] - weight[y]
                    larger = max(load[high] - gain, load[rank] + gain)
                    if larger < largest and not resident[x, rank] and not resident[y, high]:
                        largest, low, give, take = larger, rank, i, j
        if low < 0:
            break
        x, y = slots[high, give], slots[low, take]
        resident[x, high] = resident[y, low] = False
        resident[x, low] = resident[y, high] = True
        slots[high, give], slots[low, take] = y, x
        load[high] += weight[y] - weight[x]
        load[low] += weight[x] - weight[y]
