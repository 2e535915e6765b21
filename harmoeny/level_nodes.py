"""Evens out many ranks in two steps: nodes among each other, then the ranks of every node."""

from __future__ import annotations

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.held import Slots, with_free
from harmoeny.level import level
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs

#: Ranks up to which all are evened out at once, which takes a time that grows with their number squared.
MOST_AT_ONCE = 64


@compiled
def level_any(shares: IntArray, counts: IntArray, resident: BoolArray, slots: Slots, costs: Costs) -> None:
    """Even out all ranks at once, or nodes first where there are too many; arguments as of :func:`level`."""
    world_size, node_ranks = len(counts), int(costs.node_ranks)
    if node_ranks == 0 or world_size <= MOST_AT_ONCE:
        level(shares, counts, resident, slots, costs, True)
        return
    _between_nodes(shares, counts, resident, slots.free, costs)
    for first in range(0, world_size, node_ranks):
        end = min(first + node_ranks, world_size)
        level(
            shares[first:end],
            counts[first:end],
            np.ascontiguousarray(resident[:, first:end]),
            Slots(slots.number[first:end], slots.free[first:end]),
            costs,
            False,
        )


@compiled
def _between_nodes(shares: IntArray, counts: IntArray, resident: BoolArray, free: IntArray, costs: Costs) -> None:
    """Let nodes give to each other as if each were one rank with all of its ranks' speed and links."""
    world_size, num_experts = counts.shape
    node_ranks = int(costs.node_ranks)
    num_nodes = -(-world_size // node_ranks)
    wanted, before = np.zeros((num_nodes, num_experts), np.int64), np.zeros((num_nodes, num_experts), np.int64)
    held, free_of_node = np.zeros((num_experts, num_nodes), np.bool_), np.zeros(num_nodes, np.int64)
    for rank in range(world_size):
        node = rank // node_ranks
        free_of_node[node] += free[rank]
        for expert in range(num_experts):
            wanted[node, expert] += counts[rank, expert]
            before[node, expert] += shares[rank, expert]
    for expert in range(num_experts):
        for rank in range(world_size):
            if resident[expert, rank]:
                held[expert, rank // node_ranks] = True
    after = before.copy()
    level(after, wanted, held, with_free(free_of_node, held), _of_node(costs), False)
    load = np.zeros(world_size, dtype=np.int64)
    for rank in range(world_size):
        for expert in range(num_experts):
            load[rank] += shares[rank, expert]
    for node in range(num_nodes):
        first, end = node * node_ranks, min((node + 1) * node_ranks, world_size)
        for expert in range(num_experts):
            change = after[node, expert] - before[node, expert]
            if change < 0:
                _take(shares[first:end, expert], load[first:end], -change)
            elif change > 0:
                _give(shares[first:end, expert], load[first:end], resident[expert, first:end], change)


@compiled
def _of_node(costs: Costs) -> Costs:
    """Return the costs of a node as a whole."""
    ranks = costs.node_ranks
    return Costs(
        costs.token_s / ranks, costs.launch_s, costs.weights_s / ranks, costs.exchange_token_s / ranks,
        costs.fetch_s / ranks, costs.peer_fetch_s / ranks, costs.exchange_latency_s / ranks, costs.copy_token_s / ranks,
        costs.tile_tokens, costs.grouped, 0.0, 1.0, 1.0, 1.0, 0.0, costs.copy_share, 1.0, 0.0, costs.early_s,
    )  # fmt: skip


@compiled
def _take(share: IntArray, load: IntArray, amount: int) -> None:
    """Take assignments of an expert from a node's ranks, from those with most of it first; both updated."""
    while amount > 0:
        rank = share.argmax()
        taken = min(amount, share[rank])
        share[rank] -= taken
        load[rank] -= taken
        amount -= taken


@compiled
def _give(share: IntArray, load: IntArray, holds: BoolArray, amount: int) -> None:
    """Give a node assignments of an expert: to the rank that executes or holds it and has least to do, else to any."""
    best = -1
    for rank in range(len(load)):
        has = share[rank] > 0 or holds[rank]
        best_has = best >= 0 and (share[best] > 0 or holds[best])
        if best < 0 or (has and not best_has) or (has == best_has and load[rank] < load[best]):
            best = rank
    share[best] += amount
    load[best] += amount
