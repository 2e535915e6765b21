"""LPLB: replicas along a fixed graph of ranks, and in every batch a linear programme that splits over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.eplb import balance
from baselines.kit.interior_point import rounded_shares, split_fractions
from baselines.kit.replicas import FloatArray, PeriodicPolicy
from harmoeny.choices import Fetch, Knowledge
from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray, Placement


@dataclass(kw_only=True)
class LPLB(PeriodicPolicy):
    """DeepSeek's linear-programming load balancer (README of deepseek-ai/LPLB), solved as in serving (SGLang #24515).

    The i-th redundant slot of a rank holds the i-th most popular expert of its i-th neighbour in a graph, so an expert
    has at most one replica. In every batch the assignments of experts with replicas are split such that the largest
    load is about the least possible, by as many steps of an interior-point method as fit the time of a batch.

    Attributes:
        interval: batches between two choices of homes and replicas; the first follows the first batch.
        window: latest batches whose counts are added up for that.
        num_steps: of the interior-point method, per batch.
    """

    name: ClassVar[str] = "lplb"
    description: ClassVar[str] = "replicas along a fixed graph, shared by a few steps of a linear programme per batch"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.HISTORY, Knowledge.EXACT})

    redundant_experts_per_rank: int = 2
    num_steps: int = 5

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number that is too small.
        """
        super().validate()
        self._at_least(num_steps=1)

    def place(self, layer: int, num_experts: int, world_size: int) -> Placement:
        """Return the homes of ``placement``, and replicas as if all experts were equally popular.

        Raises:
            ValueError: too few slots.
        """
        placement = super().place(layer, num_experts, world_size)
        if self.fetch == Fetch.NONE:
            return placement
        return self._with_replicas(np.ones(num_experts), placement.home, world_size)

    def rearranged(self, load: IntArray | FloatArray, placement: Placement, num_slots: int) -> Placement:  # noqa: ARG002
        """Return new homes, where every rank has as many experts, and the replicas of their most popular ones."""
        home, (num_experts, world_size) = placement.home, placement.resident.shape
        if num_experts % world_size == 0:
            at_home = Placement.from_home(home, world_size).resident
            whole = load.astype(np.int64)
            home = balance(whole, at_home, num_experts // world_size, num_nodes=1, num_groups=1).argmax(axis=1)
        return self._with_replicas(load.astype(np.float64), home, world_size)

    def _with_replicas(self, load: FloatArray, home: IntArray, world_size: int) -> Placement:
        return Placement(home, resident_along_graph(load, home, world_size, self.redundant_experts_per_rank))

    def executed(self, counts: IntArray, placement: Placement) -> IntArray:
        """Return int64 ``[num_experts, world_size]``, the shares that the programme's last step gives."""
        load, resident = counts.sum(axis=0), placement.resident
        shares: IntArray = np.where(resident, load[:, None], 0)
        shared = np.flatnonzero((resident.sum(axis=1) > 1) & (load > 0))
        if len(shared) == 0:
            return shares
        shares[shared] = 0
        unit = float(load.sum()) / len(counts)
        parts = split_fractions(load[shared] / unit, resident[shared], shares.sum(axis=0) / unit, self.num_steps)
        shares[shared] = rounded_shares(load[shared], parts)
        return shares


@compiled
def neighbour(rank: int, slot: int, world_size: int) -> int:
    """Return the rank whose expert a slot replicates; for every slot, ranks and neighbours are one to one.

    A power of two ranks are the corners of a hypercube, and slots take its dimensions in turn; other numbers stand in a
    circle, and slots take steps of 1, 2, 4, ... in turn.
    """
    num_steps = 1
    while 1 << num_steps < world_size:
        num_steps += 1
    step = 1 << (slot % num_steps)
    return rank ^ step if 1 << num_steps == world_size else (rank + step) % world_size


@compiled
def resident_along_graph(load: FloatArray, home: IntArray, world_size: int, num_replicas: int) -> BoolArray:
    """Return the residency in which slot i of a rank replicates the i-th most popular expert of its i-th neighbour.

    Args:
        load: float64 ``[num_experts]``.
        home: int64 ``[num_experts]``.
        world_size: number of ranks.
        num_replicas: slots per rank; those whose neighbour has fewer experts stay empty.

    Returns:
        bool ``[num_experts, world_size]``.
    """
    resident = np.zeros((len(load), world_size), dtype=np.bool_)
    rank_of = np.zeros(world_size, dtype=np.int64)  # how many more popular experts a rank has
    holder = np.full((world_size, num_replicas), -1, dtype=np.int64)
    if world_size > 1:
        for rank in range(world_size):
            for slot in range(num_replicas):
                holder[neighbour(rank, slot, world_size), slot] = rank
    for expert in np.argsort(-load, kind="mergesort"):
        owner = home[expert]
        resident[expert, owner] = True
        if rank_of[owner] < num_replicas and holder[owner, rank_of[owner]] >= 0:
            resident[expert, holder[owner, rank_of[owner]]] = True
        rank_of[owner] += 1
    return resident
