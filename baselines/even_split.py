"""Even split: every expert's assignments are shared over all ranks, so every rank needs all experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numba
import numpy as np

from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy


@dataclass(kw_only=True)
class EvenSplit(Policy):
    """Perfect balance at the price of fetching: the paper's "even split" scheduling policy (arXiv 2506.12417)."""

    name: ClassVar[str] = "even_split"
    description: ClassVar[str] = "every expert's tokens are shared evenly over all ranks"

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Deal ``counts`` (int64 ``[world_size, num_experts]``) out to the ranks in turn, expert after expert.

        Loads differ by at most one assignment, and so do the shares of one expert.
        """
        tokens, fetch = _deal(counts, placement.resident)
        return Plan(tokens=tokens, fetch=fetch)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]  # numba ships no types
def _deal(counts: IntArray, resident: BoolArray) -> tuple[IntArray, BoolArray]:
    world_size, num_experts = counts.shape
    tokens = np.empty((world_size, num_experts, world_size), dtype=np.int64)
    next_rank = np.zeros(num_experts, dtype=np.int64)  # where the deal of every expert begins
    for expert in range(1, num_experts):
        next_rank[expert] = (next_rank[expert - 1] + counts[:, expert - 1].sum()) % world_size
    fetch = np.zeros((num_experts, world_size), dtype=np.bool_)
    for src in range(world_size):
        for expert in range(num_experts):
            share, extra = divmod(counts[src, expert], world_size)
            first = next_rank[expert]
            for dst in range(world_size):
                n = share + (1 if (dst - first) % world_size < extra else 0)
                tokens[src, expert, dst] = n
                if n > 0 and not resident[expert, dst]:
                    fetch[expert, dst] = True
            next_rank[expert] = (first + extra) % world_size
    return tokens, fetch
