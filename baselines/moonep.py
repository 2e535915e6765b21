"""MoonEP: every rank executes exactly the mean, whatever it takes to bring the experts there."""

from __future__ import annotations

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
class MoonEP(Policy):
    """Moonshot's expert parallelism (github.com/MoonshotAI/MoonEP): perfect balance in every batch.

    The rank that lacks most is filled up by the rank that has most, again and again, until all have the mean. A rank is
    filled up once, so it imports experts of one other rank only, and has memory for twice its own.
    """

    name: ClassVar[str] = "moonep"
    description: ClassVar[str] = "every rank executes exactly the mean, with experts imported from one other rank"

    fetch: str = Fetch.PEER.value

    def room(self, num_experts: int, world_size: int) -> int | None:
        """Return the experts that a rank has room for: twice its own, unless it is set."""
        if self.num_slots is not None or self.fetch == Fetch.NONE:
            return self.num_slots
        return min(2 * -(-num_experts // world_size), num_experts)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Even ``counts`` (int64 ``[world_size, num_experts]``) out: loads differ by at most one assignment."""
        executed = home_executed(counts, placement)
        even_out(executed, placement.home)
        return plan_from_tokens(tokens_of_ranges(counts, executed, np.zeros_like(placement.home)), placement)


@compiled
def even_out(executed: IntArray, home: IntArray) -> None:
    """Move assignments between ranks until all have the mean.

    Where the mean is no whole number, the ranks that have most at the start have one more than the others.

    Args:
        executed: int64 ``[num_experts, world_size]``, everything at home; updated.
        home: int64 ``[num_experts]``.
    """
    world_size = executed.shape[1]
    load = executed.sum(axis=0)
    mean, extra = divmod(load.sum(), world_size)
    surplus = load - mean
    surplus[np.argsort(-load, kind="mergesort")[:extra]] -= 1
    quota = np.zeros((world_size, world_size), dtype=np.int64)  # [owner, receiver]
    for _ in range(world_size - 1):
        owner, receiver = surplus.argmax(), surplus.argmin()
        if surplus[owner] <= 0:
            break
        # The owner may give more than its surplus: it is then filled up by another one.
        quota[owner, receiver] = -surplus[receiver]
        surplus[owner] += surplus[receiver]
        surplus[receiver] = 0
    for owner in range(world_size):
        left = np.where(home == owner, executed[:, owner], 0)
        while quota[owner].max() > 0:
            receiver, expert = quota[owner].argmax(), left.argmax()
            n = min(quota[owner, receiver], left[expert])
            executed[expert, owner] -= n
            executed[expert, receiver] += n
            quota[owner, receiver] -= n
            left[expert] -= n
