"""What rows of an exchange take on the links between ranks, inside nodes and between them."""

from __future__ import annotations

import numpy as np

from harmoeny.cells import executed_by
from harmoeny.compiled import compiled, inlined
from harmoeny.placement import IntArray
from harmoeny.predict import Costs, Loads, rows_s


@compiled
def nodes(world_size: int, costs: Costs) -> IntArray:
    """Return int64 ``[world_size]``, the node of every rank; all the same where there is one."""
    node: IntArray = np.zeros(world_size, dtype=np.int64)
    if costs.node_ranks > 0:
        for rank in range(world_size):
            node[rank] = rank // int(costs.node_ranks)
    return node


@compiled
def exchange_s(counts: IntArray, shares: IntArray, loads: Loads, costs: Costs) -> float:
    """Return how long an exchange takes one way, in seconds.

    Inside one node what a rank sends or receives decides. With several, what it does inside its node and what it does
    over the network are beside each other.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own and its node's first.
        loads: those of the shares.
        costs: the machine's.
    """
    world_size = len(counts)
    if costs.node_ranks == 0 or costs.node_ranks >= world_size:
        return rows_s(loads, costs)
    rows = np.zeros((2, 2, world_size), dtype=np.int64)  # inside or between, sent or received
    for first in range(0, world_size, int(costs.node_ranks)):
        end = min(first + int(costs.node_ranks), world_size)
        _add_inside(rows[0, :, first:end], counts[first:end], shares[first:end])
    for rank in range(world_size):
        rows[1, 0, rank] = loads.sent[rank] - rows[0, 0, rank]
        rows[1, 1, rank] = loads.received[rank] - rows[0, 1, rank]
    return slowest_s(rows[0].max(), rows[1].max(), costs)


@compiled
def exchange_at_home_s(counts: IntArray, home: IntArray, loads: Loads, costs: Costs) -> float:
    """Return the same where every assignment is executed on its expert's home rank (int64 ``[num_experts]``)."""
    world_size, num_experts = counts.shape
    node_ranks = int(costs.node_ranks)
    if node_ranks == 0 or node_ranks >= world_size:
        return rows_s(loads, costs)
    rows = np.zeros((2, 2, world_size), dtype=np.int64)
    for expert in range(num_experts):
        dst, inside = home[expert], 0
        first = dst // node_ranks * node_ranks
        for src in range(first, min(first + node_ranks, world_size)):
            rows[0, 0, src] += counts[src, expert]
            inside += counts[src, expert]
        rows[0, 0, dst] -= counts[dst, expert]
        rows[0, 1, dst] += inside - counts[dst, expert]
    for rank in range(world_size):
        rows[1, 0, rank] = loads.sent[rank] - rows[0, 0, rank]
        rows[1, 1, rank] = loads.received[rank] - rows[0, 1, rank]
    return slowest_s(rows[0].max(), rows[1].max(), costs)


@inlined
def slowest_s(inside: int, beyond: int, costs: Costs) -> float:
    """Return how long an exchange takes.

    Args:
        inside: the most rows that a rank sends or receives inside its node.
        beyond: likewise beyond it.
        costs: the machine's.
    """
    slowest = max(inside * costs.inside_share, beyond * costs.network_share)
    return float(costs.exchange_latency_s + slowest * costs.exchange_token_s)


@compiled
def _add_inside(rows: IntArray, counts: IntArray, shares: IntArray) -> None:
    """Add what ranks of a node send each other, dealt out as :func:`harmoeny.plan.deal` does it.

    Args:
        rows: int64 ``[2, num_ranks]``, sent or received; updated.
        counts: int64 ``[num_ranks, num_experts]``, the assignments of its ranks.
        shares: int64 ``[num_ranks, num_experts]``, how many of anybody's they execute.
    """
    num_ranks, num_experts = counts.shape
    found, taken = np.empty(num_experts, dtype=np.int64), np.empty(num_experts, dtype=np.int64)
    num_taken, left = 0, np.zeros(num_experts, dtype=np.int64)
    for rank in range(num_ranks):
        for i in range(executed_by(rank, shares, found)):
            more = shares[rank, found[i]] - counts[rank, found[i]]
            if more > 0:
                if left[found[i]] == 0:
                    taken[num_taken] = found[i]
                    num_taken += 1
                left[found[i]] += more
    for i in range(num_taken):
        expert, kept = taken[i], 0
        for rank in range(num_ranks):
            kept += max(counts[rank, expert] - shares[rank, expert], 0)
        sent = received = min(kept, left[expert])
        for rank in range(num_ranks):
            more = counts[rank, expert] - shares[rank, expert]
            if more > 0:
                inside = min(more, sent)
                sent -= inside
                rows[0, rank] += inside
            elif more < 0:
                inside = min(-more, received)
                received -= inside
                rows[1, rank] += inside
