"""Weights that several ranks fetch from one: those that have them hand them on, along a tree."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.compiled import compiled, inlined
from harmoeny.cost import Links
from harmoeny.placement import BoolArray, FloatArray, IntArray
from harmoeny.predict import Costs

#: Where nobody sends.
NOBODY = -1
#: Ranks up to which trees are chosen: what that takes grows with their number squared.
MOST_RANKS = 64


class Queues(NamedTuple):
    """Until when links are busy, in seconds after fetches begin: every one carries an expert after the other.

    Attributes:
        sending_s: float64 ``[2, world_size]``, what every rank sends inside its node, and over the network.
        receiving_s: likewise, what it receives.
        link_s: float64 ``[num_links]``, where ranks are joined by links of their own.
    """

    sending_s: FloatArray
    receiving_s: FloatArray
    link_s: FloatArray


@compiled
def idle_queues(world_size: int, links: Links) -> Queues:
    """Return the queues of links that are idle."""
    num_links = links.on_way.max() + 1 if links.on_way.size > 0 else 0
    ends = np.zeros((2, 2, world_size))
    return Queues(ends[0], ends[1], np.zeros(num_links))


@inlined
def part_sent(halved: BoolArray, expert: int, rank: int) -> float:
    """Return how much of an expert a rank is sent, if anything; ``halved``: as of :class:`Sources`."""
    return 0.5 if halved.size > 0 and halved[expert, rank] else 1.0


@inlined
def arrival_s(
    src: int, dst: int, part: float, since_s: float, node: IntArray, queues: Queues, costs: Costs, links: Links
) -> float:
    """Return when an expert that ``src`` has since then would be at ``dst``, behind what is queued already.

    Args:
        src: the sender.
        dst: the receiver.
        part: how much of the expert is sent: 1 or 0.5.
        since_s: when ``src`` has it.
        node: int64 ``[world_size]``, of the ranks.
        queues: of the links.
        costs: the machine's.
        links: between its ranks.
    """
    if len(queues.link_s) > 0:
        end_s = since_s
        for i in range(links.on_way.shape[2]):
            link = links.on_way[src, dst, i]
            if link >= 0:
                end_s = max(end_s, max(since_s, queues.link_s[link]) + part * links.seconds[src, dst, i])
        return end_s
    kind = int(node[src] != node[dst])
    share = costs.network_share if kind == 1 else costs.inside_share
    expert_s = part * (costs.peer_fetch_s - costs.exchange_latency_s) * share
    begin_s = max(since_s, max(queues.sending_s[kind, src], queues.receiving_s[kind, dst]))
    return float(max(begin_s + expert_s, since_s + costs.pair_share * expert_s))


@inlined
def enqueue(
    src: int, dst: int, part: float, since_s: float, node: IntArray, queues: Queues, costs: Costs, links: Links
) -> float:
    """Queue an expert and return when it is there; arguments as of :func:`arrival_s`."""
    end_s = arrival_s(src, dst, part, since_s, node, queues, costs, links)
    occupy(src, dst, part, since_s, end_s, node, queues, links)
    return end_s


@inlined
def occupy(
    src: int, dst: int, part: float, since_s: float, end_s: float, node: IntArray, queues: Queues, links: Links
) -> None:
    """Keep links busy with an expert that will be there at ``end_s``; arguments as of :func:`arrival_s`."""
    if len(queues.link_s) > 0:
        for i in range(links.on_way.shape[2]):
            link = links.on_way[src, dst, i]
            if link >= 0:
                queues.link_s[link] = max(since_s, queues.link_s[link]) + part * links.seconds[src, dst, i]
    else:
        kind = int(node[src] != node[dst])
        queues.sending_s[kind, src] = queues.receiving_s[kind, dst] = end_s


@inlined
def choose_sender(
    dst: int,
    part: float,
    having: IntArray,
    num_having: int,
    heads: IntArray,
    num_heads: int,
    since_s: FloatArray,
    node: IntArray,
    queues: Queues,
    costs: Costs,
    links: Links,
) -> tuple[int, float]:
    """Return who brings an expert to a rank soonest, and when: of its own node if anybody there has it, else its head.

    Args:
        dst: the receiver.
        part: as of :func:`arrival_s`.
        having: int64, first the ranks that have or get it: its home, then others in ascending order, before ``dst``.
        num_having: how many these are.
        heads: int64, likewise the first of them on every node.
        num_heads: how many these are.
        since_s: float64 ``[world_size]``, when each of these has it.
        node: int64 ``[world_size]``, ascending.
        queues: of the links.
        costs: the machine's.
        links: between its ranks.
    """
    first, home = num_having, having[0]
    while first > 1 and node[having[first - 1]] == node[dst]:
        first -= 1
    best, best_s = NOBODY, np.inf
    for place in range(first, num_having):
        src = having[place]
        end_s = arrival_s(src, dst, part, since_s[src], node, queues, costs, links)
        if end_s < best_s:
            best, best_s = src, end_s
    if node[home] == node[dst]:
        end_s = arrival_s(home, dst, part, since_s[home], node, queues, costs, links)
        if end_s < best_s:
            best, best_s = home, end_s
    elif first == num_having:
        for place in range(num_heads):
            src = heads[place]
            end_s = arrival_s(src, dst, part, since_s[src], node, queues, costs, links)
            if end_s < best_s:
                best, best_s = src, end_s
    return best, best_s


@compiled
def relayed_s(
    senders: IntArray, halved: BoolArray, home: IntArray, node: IntArray, costs: Costs, links: Links
) -> FloatArray:
    """Return float64 ``[world_size]``, when a rank has all that others send it, after fetches begin; 0: nothing.

    Args:
        senders: int64 ``[num_experts, world_size]``, who sends every rank an expert, ``NOBODY`` where nobody does: the
            expert's home, or a rank before this one that gets it, too.
        halved: bool ``[num_experts, world_size]``, of which only half; of no size: none.
        home: int64 ``[num_experts]``.
        node: int64 ``[world_size]``.
        costs: the machine's.
        links: between its ranks.
    """
    num_experts, world_size = senders.shape
    queues, arrived_s, since_s = idle_queues(world_size, links), np.zeros(world_size), np.zeros(world_size)
    for expert in range(num_experts):
        since_s[home[expert]] = 0.0
        for rank in range(world_size):
            src = senders[expert, rank]
            if src == NOBODY:
                continue
            part = part_sent(halved, expert, rank)
            end_s = enqueue(src, rank, part, since_s[src], node, queues, costs, links) + costs.exchange_latency_s
            since_s[rank] = end_s
            arrived_s[rank] = max(arrived_s[rank], end_s)
    return arrived_s


def num_hops(sent: BoolArray, senders: IntArray, home: IntArray) -> IntArray:
    """Return int64 ``[num_experts, world_size]``, over how many ways an expert comes one by one; 0: it stays.

    Args:
        sent: bool ``[num_experts, world_size]``, the ranks that every expert goes to.
        senders: int64 ``[num_experts, world_size]``, who sends it there.
        home: int64 ``[num_experts]``, who has it.
    """
    hops = np.zeros(sent.shape, dtype=np.int64)
    for expert, rank in np.argwhere(sent).tolist():
        src = senders[expert, rank]
        hops[expert, rank] = 1 if src == home[expert] else hops[expert, src] + 1
    return hops
