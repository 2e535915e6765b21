"""LLEP: ranks above their capacity spill ranges of tokens, with the weights, to the least loaded ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.ranges import tokens_of_ranges
from harmoeny.choices import Fetch
from harmoeny.compiled import compiled
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan, home_executed, plan_from_tokens
from harmoeny.policy import Policy


@dataclass(kw_only=True)
class LLEP(Policy):
    """Least-loaded expert parallelism (arXiv 2601.17111; the plan of github.com/SalesforceAIResearch/LeastLoadedEP).

    Experts are taken by falling popularity. What the home rank cannot take of an expert below its capacity is spilled
    in chunks to the least loaded ranks, which get the expert's weights from the home rank.

    Attributes:
        capacity_factor: a rank's capacity in multiples of the even load.
        min_tokens: a chunk of fewer is given to a rank only if it is all that is left of the expert.
        least_imbalance: below this ratio of the largest load to the mean, everything is executed at home; null: never
            for that reason.
    """

    name: ClassVar[str] = "llep"
    description: ClassVar[str] = "spills what is above a rank's capacity to the least loaded ranks in every batch"

    fetch: str = Fetch.PEER.value
    capacity_factor: float = 1.1
    min_tokens: int = 1024
    least_imbalance: float | None = None

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number that is too small.
        """
        super().validate()
        if not 1 <= self.capacity_factor < math.inf:
            raise ValueError(f"capacity_factor: {self.capacity_factor}, must be a number of at least 1")
        if self.min_tokens < 1:
            raise ValueError(f"min_tokens: {self.min_tokens}, must be at least 1")
        if self.least_imbalance is not None and not self.least_imbalance >= 1:
            raise ValueError(f"least_imbalance: {self.least_imbalance}, must be at least 1, or null")

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Spill ``counts`` (int64 ``[world_size, num_experts]``) above the capacity; homes keep the first range."""
        executed = home_executed(counts, placement)
        load = executed.sum(axis=0)
        total, world_size = int(load.sum()), len(load)
        if self.least_imbalance is None or int(load.max()) * world_size >= self.least_imbalance * total:
            # Rounded, since 100 * 1.1 is a little more than 110.
            capacity = math.floor(round(total * self.capacity_factor / world_size, 6))
            spill(executed, placement.home, capacity, self.min_tokens)
        return plan_from_tokens(tokens_of_ranges(counts, executed, placement.home), placement)


@compiled
def spill(executed: IntArray, home: IntArray, capacity: int, min_tokens: int) -> None:
    """Spill what is above the capacity.

    A rank's load is what it was given so far and what of its own experts has not been looked at.

    Args:
        executed: int64 ``[num_experts, world_size]``, everything at home; updated.
        home: int64 ``[num_experts]``.
        capacity: of a rank.
        min_tokens: least size of a chunk that is not the last.
    """
    world_size = executed.shape[1]
    load = executed.sum(axis=0)
    popularity = executed.sum(axis=1)
    for expert in np.argsort(-popularity, kind="mergesort"):
        owner = home[expert]
        # More of its experts may follow, but what is left of those is part of its load already.
        left = min(max(load[owner] - capacity, 0), popularity[expert])
        load[owner] -= left
        executed[expert, owner] -= left
        while left > 0:
            taker = 1 if owner == 0 else 0
            for rank in range(world_size):
                if rank != owner and load[rank] < load[taker]:
                    taker = rank
            chunk = min(left, capacity - load[taker])
            # Where the least loaded rank has too little room, so have all others, and it has to take what is left.
            if chunk <= 0 or (chunk < min_tokens and chunk < left):
                chunk = left
            executed[expert, taker] += chunk
            load[taker] += chunk
            left -= chunk
