"""The bound: even load, nothing moved and next to nothing sent, for every rank holds every expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harmoeny.choices import Fetch
from harmoeny.compiled import compiled
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan, hand_over, plan_from_tokens
from harmoeny.policy import Policy


@dataclass(kw_only=True)
class Ideal(Policy):
    """Perfectly even load at no moving cost; no system, because it needs the memory of all experts on every rank.

    Its output is the model's, so it is measured like a system.
    """

    name: ClassVar[str] = "ideal"
    description: ClassVar[str] = "reference, not a system: even load, every expert resident on every rank"
    bound: ClassVar[bool] = True

    fetch: str = Fetch.NONE.value

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a fetch strategy that moves weights.
        """
        super().validate()
        if self.fetch != Fetch.NONE:
            raise ValueError(f"fetch: {self.fetch!r}, must be none: the reference moves no weights")

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Leave ``counts`` (int64 ``[world_size, num_experts]``) where they are, and even out what ranks have too much.

        Loads differ by at most one assignment.
        """
        return plan_from_tokens(_even_out(counts), placement)


@compiled
def _even_out(counts: IntArray) -> IntArray:
    world_size, num_experts = counts.shape
    own = counts.sum(axis=1)
    base, extra = divmod(own.sum(), world_size)
    room = np.full(world_size, base, dtype=np.int64)
    # What does not divide stays with the ranks that have most.
    room[np.argsort(-own, kind="mergesort")[:extra]] += 1
    tokens = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    for src in range(world_size):
        for expert in range(num_experts):
            n = min(counts[src, expert], room[src])
            tokens[src, expert, src] = n
            room[src] -= n
    dst = 0
    for src in range(world_size):
        for expert in range(num_experts):
            dst = hand_over(tokens[src, expert], counts[src, expert] - tokens[src, expert, src], room, dst)
    return tokens
