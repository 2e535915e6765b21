"""Even split: every expert's assignments are shared over all ranks, so every rank needs all experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.plan import Plan, plan_from_tokens
from harmoeny.policy import Policy

DEALS = ("in_turn", "per_sender")


@dataclass(kw_only=True)
class EvenSplit(Policy):
    """Perfect balance at the price of fetching: the paper's "even split" scheduling policy (arXiv 2506.12417).

    Attributes:
        deal: ``in_turn`` goes on from expert to expert and from sender to sender, so that loads differ by at most one
            assignment. ``per_sender`` is what the paper's authors ran, as the loads of their GPUs show: every sender
            deals out each expert's assignments from the first rank on, so the first ranks get all that does not
            divide; of a batch with fewer assignments per sender and expert than ranks the last ranks get none.
    """

    name: ClassVar[str] = "even_split"
    description: ClassVar[str] = "every expert's tokens are shared evenly over all ranks"

    deal: str = "in_turn"

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: an unknown deal.
        """
        super().validate()
        if self.deal not in DEALS:
            raise ValueError(f"deal: {self.deal!r}, must be one of {', '.join(DEALS)}")

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Deal ``counts`` (int64 ``[world_size, num_experts]``) out to the ranks."""
        if self.deal == "per_sender":
            return plan_from_tokens(_deal_per_sender(counts), placement)
        tokens, fetch = _deal(counts, placement.resident)
        return Plan(tokens=tokens, fetch=fetch)


def _deal_per_sender(counts: IntArray) -> IntArray:
    """Return int64 ``[world_size, num_experts, world_size]``, every sender's and expert's deal from rank 0 on."""
    world_size = len(counts)
    tokens: IntArray = (counts[:, :, None] + np.arange(world_size - 1, -1, -1)) // world_size
    return tokens


@compiled
def _deal(counts: IntArray, resident: BoolArray) -> tuple[IntArray, BoolArray]:
    world_size, num_experts = counts.shape
    tokens = np.empty((world_size, num_experts, world_size), dtype=np.int64)
    next_rank = np.zeros(num_experts, dtype=np.int64)  # where the deal of every expert begins
    totals = counts.sum(axis=0)
    for expert in range(1, num_experts):
        next_rank[expert] = (next_rank[expert - 1] + totals[expert - 1]) % world_size
    fetch = np.zeros((num_experts, world_size), dtype=np.bool_)
    for expert in range(num_experts):
        # The deal goes on from sender to sender, so it reaches every rank, or the first ones in turn.
        for i in range(min(world_size, totals[expert])):
            dst = (next_rank[expert] + i) % world_size
            fetch[expert, dst] = not resident[expert, dst]
    for src in range(world_size):
        for expert in range(num_experts):
            share = counts[src, expert] // world_size
            extra = counts[src, expert] % world_size
            row = tokens[src, expert]
            row[:] = share
            dst = next_rank[expert]
            for _ in range(extra):
                row[dst] += 1
                dst = dst + 1 if dst + 1 < world_size else 0
            next_rank[expert] = dst
    return tokens, fetch
