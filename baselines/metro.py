"""METRO: every activated expert is executed on one of its replicas, so that no rank reads the weights of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.eplb import EPLB
from harmoeny.choices import Knowledge
from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray, Placement


@dataclass(kw_only=True)
class METRO(EPLB):
    """METRO's routing over EPLB's replicas (arXiv 2512.09277): it balances activated experts and not tokens.

    In decode a rank's time is that of reading the weights of the experts that any token asks for. So every one of them
    is executed on exactly one of its replicas, chosen such that the most on any rank are the fewest possible.
    """

    name: ClassVar[str] = "metro"
    description: ClassVar[str] = "EPLB's replicas, one per activated expert and batch: the fewest experts per rank"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.HISTORY, Knowledge.EXACT})

    def executed(self, counts: IntArray, placement: Placement) -> IntArray:
        """Return int64 ``[num_experts, world_size]``: everything of an expert on one rank."""
        load = counts.sum(axis=0)
        chosen = choose_replicas(load, placement.home, placement.resident)
        executed = np.zeros(placement.resident.shape, dtype=np.int64)
        executed[np.arange(len(load)), chosen] = load
        return executed


@compiled
def choose_replicas(load: IntArray, home: IntArray, resident: BoolArray) -> IntArray:
    """Choose one rank per activated expert such that the most experts on a rank are the fewest possible.

    First greedily: experts with the fewest replicas before the others, each to the rank with the fewest activated
    experts, of equal ones to the one with the fewest tokens. Then experts change ranks along paths from a rank with
    the most to one with at least two fewer, until there is no such path; if none leads away from one rank with the
    most, what the ranks that it reaches execute can go nowhere else, and nothing is better.

    Args:
        load: int64 ``[num_experts]``, assignments; 0: not activated.
        home: int64 ``[num_experts]``, for experts that are not.
        resident: bool ``[num_experts, world_size]``.

    Returns:
        int64 ``[num_experts]``, the ranks.
    """
    num_experts, world_size = resident.shape
    chosen = home.copy()
    activated = np.zeros(world_size, dtype=np.int64)
    tokens = np.zeros(world_size, dtype=np.int64)
    copies = np.zeros(num_experts, dtype=np.int64)
    for expert in range(num_experts):
        copies[expert] = resident[expert].sum()
    for expert in np.argsort(copies, kind="mergesort"):
        if load[expert] == 0:
            continue
        best = -1
        for rank in range(world_size):
            if resident[expert, rank] and (
                best < 0
                or activated[rank] < activated[best]
                or (activated[rank] == activated[best] and tokens[rank] < tokens[best])
            ):
                best = rank
        chosen[expert] = best
        activated[best] += 1
        tokens[best] += load[expert]
    while _relieve(load, chosen, activated, resident):
        pass
    return chosen


@compiled
def _relieve(load: IntArray, chosen: IntArray, activated: IntArray, resident: BoolArray) -> bool:
    """Move experts along one path from the rank with the most to one with at least two fewer; tell whether there was.

    Args:
        load: int64 ``[num_experts]``; only activated experts move.
        chosen: int64 ``[num_experts]``; updated.
        activated: int64 ``[world_size]``, activated experts per rank; updated.
        resident: bool ``[num_experts, world_size]``.
    """
    num_experts, world_size = resident.shape
    most = activated.argmax()
    moved = np.full(world_size, -1, dtype=np.int64)  # the expert that would come to a rank that the search has reached
    queue = np.empty(world_size, dtype=np.int64)
    queue[0] = most
    head, tail = 0, 1
    while head < tail:
        rank = queue[head]
        head += 1
        for expert in range(num_experts):
            if chosen[expert] != rank or load[expert] == 0:
                continue
            for target in range(world_size):
                if not resident[expert, target] or moved[target] >= 0 or target == most:
                    continue
                moved[target] = expert
                if activated[target] <= activated[most] - 2:
                    activated[target] += 1
                    activated[most] -= 1
                    while target != most:
                        previous = chosen[moved[target]]
                        chosen[moved[target]] = target
                        target = previous
                    return True
                queue[tail] = target
                tail += 1
    return False
