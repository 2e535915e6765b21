"""Packs copies of experts onto ranks: how many, where they go, and which rank gets what so that much stays."""

from __future__ import annotations

import heapq

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, FloatArray, IntArray


@compiled
def copies_by_load(load: FloatArray, num_copies: int, max_copies: int) -> IntArray:
    """Give every copy beyond the first to the expert whose copies carry most; of equal ones to the first.

    Args:
        load: float64 ``[num_experts]``.
        num_copies: of all experts together, ``num_experts`` to ``num_experts * max_copies``.
        max_copies: most copies of one expert.

    Returns:
        int64 ``[num_experts]``, at least 1 each.
    """
    copies = np.ones(len(load), dtype=np.int64)
    share = load.copy()
    for _ in range(num_copies - len(load)):
        heaviest = share.argmax()
        copies[heaviest] += 1
        # No more than max_copies: then it is no candidate any more.
        share[heaviest] = load[heaviest] / copies[heaviest] if copies[heaviest] < max_copies else -1.0
    return copies


@compiled
def longest_first(load: FloatArray, copies: IntArray, num_ranks: int, num_slots: int) -> tuple[BoolArray, FloatArray]:
    """Put copies by falling share on the least loaded rank that has a free slot and not that expert.

    A copy for which there is no such rank is left out; slots that stay free take the heaviest experts that their ranks
    lack.

    Args:
        load: float64 ``[num_experts]``, shared evenly by an expert's copies.
        copies: int64 ``[num_experts]``, 1 to ``num_ranks``; at most ``num_ranks * num_slots`` together.
        num_ranks: number of ranks.
        num_slots: experts that a rank holds, at most ``num_experts``.

    Returns:
        bool ``[num_experts, num_ranks]``, ``num_slots`` true per rank, and float64 ``[num_ranks]``, the loads.
    """
    resident = np.zeros((len(load), num_ranks), dtype=np.bool_)
    rank_load = np.zeros(num_ranks)
    free = np.full(num_ranks, num_slots, dtype=np.int64)
    least_loaded = [(0.0, rank) for rank in range(num_ranks)]  # of the ranks with free slots, a heap
    share = load / copies
    order = np.argsort(-share, kind="mergesort")
    for expert in order:
        takers = [heapq.heappop(least_loaded)[1] for _ in range(min(copies[expert], len(least_loaded)))]
        for rank in takers:
            resident[expert, rank] = True
            rank_load[rank] += share[expert]
            free[rank] -= 1
            if free[rank] > 0:
                heapq.heappush(least_loaded, (rank_load[rank], rank))
    if not free.any():
        return resident, rank_load
    for rank in range(num_ranks):
        for expert in order:
            if free[rank] > 0 and not resident[expert, rank]:
                resident[expert, rank] = True
                free[rank] -= 1
    rank_load[:] = 0
    for expert in range(len(load)):
        rank_load += load[expert] / resident[expert].sum() * resident[expert]
    return resident, rank_load


def renumber(new: BoolArray, present: BoolArray) -> BoolArray:
    """Reorder the columns of ``new`` such that as much as possible of ``present`` stays where it is.

    Most pairs of columns have nothing in common, and only the others are looked at: columns are matched with those of
    ``present``, or for the least possible gain with nobody, and whoever is left takes what is left.
    """
    num_columns = new.shape[1]
    stays = (csr_array(new.T.astype(np.float32)) @ csr_array(present.astype(np.float32))).tocoo()
    alone = np.arange(num_columns, dtype=np.int32)  # SciPy 1.14 matches by no other indices
    columns = np.concatenate([stays.row, alone])
    partners = np.concatenate([stays.col, num_columns + alone])
    # Costs of 0 would be no edges.
    costs = stays.data.max(initial=0) + 1 - np.concatenate([stays.data, np.zeros(num_columns, dtype=np.float32)])
    graph = csr_array((costs, (columns, partners)), shape=(num_columns, 2 * num_columns))
    _, targets = min_weight_full_bipartite_matching(graph)
    targets[targets >= num_columns] = np.setdiff1d(alone, targets)
    renumbered = np.empty_like(new)
    renumbered[:, targets] = new
    return renumbered
