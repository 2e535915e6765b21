"""Where the weights of fetches come from: the host or other ranks, and when they are there."""

from __future__ import annotations

import numpy as np

from harmoeny.cells import executed_by
from harmoeny.compiled import compiled, inlined
from harmoeny.cost import Links
from harmoeny.held import Slots
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs, FloatArray, Sources, add_slice, no_senders
from harmoeny.relay import MOST_RANKS, NOBODY, choose_sender, idle_queues, occupy
from harmoeny.wire import nodes


@inlined
def _way_s(busy_s: FloatArray, links: Links, src: int, dst: int, times: float) -> float:
    """Return how long the busiest link from rank to rank is busy, with one more expert or, ``times`` = 0, without."""
    slowest_s = 0.0
    for i in range(links.on_way.shape[2]):
        link = links.on_way[src, dst, i]
        if link >= 0:
            slowest_s = max(slowest_s, busy_s[link] + times * links.seconds[src, dst, i])
    return slowest_s


@inlined
def _add_way(busy_s: FloatArray, links: Links, src: int, dst: int) -> None:
    """Send one more expert from rank to rank; ``busy_s``: float64 ``[num_links]``, updated."""
    for i in range(links.on_way.shape[2]):
        link = links.on_way[src, dst, i]
        if link >= 0:
            busy_s[link] += links.seconds[src, dst, i]


@compiled
def choose_sources(
    counts: IntArray,
    shares: IntArray,
    home: IntArray,
    resident: BoolArray,
    slots: Slots,
    costs: Costs,
    links: Links,
) -> Sources:
    """Decide for every fetch which source is less busy: the host's link, with the restores, or a rank that has it.

    That is the expert's home rank and, where ranks hand weights on (:attr:`Costs.relays`), those that get it before.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks; what was in one that is not free has to be restored after a fetch into it.
        costs: the machine's.
        links: between its ranks.
    """
    world_size, num_experts = shares.shape
    linked = links.on_way.shape[0] == world_size
    link_busy_s = np.zeros(links.on_way.max() + 1 if linked else 0)
    node = nodes(world_size, costs)
    from_peer = np.zeros((num_experts, world_size), dtype=np.bool_)
    # The latency is that of all that a rank sends together. By kind: inside a node, and between nodes.
    mean_s = costs.peer_fetch_s - costs.exchange_latency_s
    expert_s = (mean_s * costs.inside_share, mean_s * costs.network_share)
    fetched, own, others = np.zeros((3, world_size)), np.zeros((3, world_size)), np.zeros((3, world_size))
    sent, received = np.zeros((2, world_size), dtype=np.int64), np.zeros((2, world_size), dtype=np.int64)
    from_host = np.zeros(world_size, dtype=np.int64)
    relays, handed_on = costs.relays > 0 and world_size <= MOST_RANKS, False
    senders = np.full((num_experts, world_size), NOBODY) if relays else no_senders()
    queues, since_s, arrived_s = idle_queues(world_size, links), np.zeros(world_size), np.zeros(world_size)
    having, heads = np.empty((2, world_size), dtype=np.int64)
    first, receivers, room, fewest = _receivers(shares, resident, slots)
    for expert in range(num_experts):
        if first[expert] == first[expert + 1]:
            continue
        source = home[expert]
        having[0], heads[0], num_having, num_heads, since_s[source] = source, source, 1, 1, 0.0
        for rank in receivers[first[expert] : first[expert + 1]]:
            share = shares[rank, expert]
            add_slice(fetched, rank, share, 1, costs)
            add_slice(own, rank, min(share, counts[rank, expert]), 1, costs)
            add_slice(others, rank, max(share - counts[rank, expert], 0), 1, costs)
            kind = int(node[source] != node[rank])
            in_turn = max(float(max(sent[kind, source], received[kind, rank]) + 1), costs.pair_share)
            peer_s = costs.exchange_latency_s + in_turn * expert_s[kind]
            if linked:
                peer_s = costs.exchange_latency_s + _way_s(link_busy_s, links, source, rank, 1.0)
            sender, end_s = source, 0.0
            if relays and source != rank:
                sender, end_s = choose_sender(
                    rank, having, num_having, heads, num_heads, since_s, node, queues, costs, links
                )
                peer_s = costs.exchange_latency_s + end_s
            arrived = received[0, rank] + received[1, rank]
            copies = from_host[rank] + 1 + max(from_host[rank] + arrived + 1 - slots.free[rank], 0)
            full = from_host[rank] >= slots.number[rank]  # weights from peers lie elsewhere until a slot is free
            if costs.peer_fetch_s > 0 and source != rank and (full or peer_s < copies * costs.fetch_s):
                from_peer[expert, rank] = True
                if relays:
                    senders[expert, rank] = sender
                    handed_on |= sender != source
                    occupy(sender, rank, since_s[sender], end_s, node, queues, links)
                    since_s[rank] = peer_s
                    arrived_s[rank] = max(arrived_s[rank], peer_s)
                    if node[rank] != node[source] and (num_having == 1 or node[rank] != node[having[num_having - 1]]):
                        heads[num_heads] = rank
                        num_heads += 1
                    having[num_having] = rank
                    num_having += 1
                sent[kind, source] += 1
                received[kind, rank] += 1
                if linked:
                    _add_way(link_busy_s, links, source, rank)
            else:
                from_host[rank] += 1
    if not handed_on:
        senders, arrived_s = no_senders(), arrivals_s(from_peer, home, costs, links)
    ready_s, host_link_s, turns = np.zeros(world_size), np.zeros(world_size), np.zeros(world_size, dtype=np.int64)
    waiting, makes_room = np.zeros(world_size, dtype=np.int64), np.zeros((3, world_size))
    for rank in range(world_size):
        ready_s[rank] = max(from_host[rank] * costs.fetch_s, arrived_s[rank])
        number = from_host[rank] + received[0, rank] + received[1, rank]
        turns[rank] = -(-number // max(slots.number[rank], 1))
        restores = max(min(number, slots.number[rank]) - slots.free[rank], 0)
        host_link_s[rank] = (from_host[rank] + restores) * costs.fetch_s
        waiting[rank] = max(from_host[rank] - room[rank] - number, 0)
        add_slice(makes_room, rank, fewest[rank], 1, costs)
    joins = room >= 0
    return Sources(from_peer, senders, ready_s, host_link_s, fetched, own, others, joins, turns, waiting, makes_room)


@compiled
def _receivers(shares: IntArray, resident: BoolArray, slots: Slots) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return who fetches what.

    Args:
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks.

    Returns:
        int64 ``[num_experts + 1]``, where every expert's receivers begin; int64, all of them; and, int64
        ``[world_size]``, the slots that are left for fetches before any resident is executed, less those, and the
        fewest assignments of a resident that is executed.
    """
    world_size, num_experts = shares.shape
    first, room = np.zeros(num_experts + 1, dtype=np.int64), np.empty(world_size, dtype=np.int64)
    fewest = np.zeros(world_size, dtype=np.int64)
    found, lacking = np.empty(num_experts, dtype=np.int64), np.empty((2, shares.size), dtype=np.int64)
    number = 0
    for rank in range(world_size):
        num_executed = executed_by(rank, shares, found)
        room[rank] = slots.number[rank] - num_executed
        for i in range(num_executed):
            if not resident[found[i], rank]:
                lacking[0, number], lacking[1, number] = found[i], rank
                first[found[i] + 1] += 1
                number += 1
            elif fewest[rank] == 0 or shares[rank, found[i]] < fewest[rank]:
                fewest[rank] = shares[rank, found[i]]
    for expert in range(num_experts):
        first[expert + 1] += first[expert]
    receivers, place = np.empty(number, dtype=np.int64), first.copy()
    for i in range(number):
        expert = lacking[0, i]
        receivers[place[expert]] = lacking[1, i]
        place[expert] += 1
    return first, receivers, room, fewest


@compiled
def arrivals_s(from_peer: BoolArray, home: IntArray, costs: Costs, links: Links) -> FloatArray:
    """Return float64 ``[world_size]``, when weights that home ranks send are there, from when all begin; 0: nothing is.

    As in any exchange, a rank is through when all that it sends to or receives from are, with what others get too.

    Args:
        from_peer: bool ``[num_experts, world_size]``, what every rank receives.
        home: int64 ``[num_experts]``.
        costs: the machine's.
        links: between its ranks.
    """
    num_experts, world_size = from_peer.shape
    node, linked = nodes(world_size, costs), links.on_way.shape[0] == world_size
    link_busy_s = np.zeros(links.on_way.max() + 1 if linked else 0)
    sent, received = np.zeros((2, world_size), dtype=np.int64), np.zeros((2, world_size), dtype=np.int64)
    is_sent = np.zeros(num_experts, dtype=np.bool_)
    for expert in range(num_experts):
        source = home[expert]
        for rank in range(world_size):
            is_sent[expert] |= from_peer[expert, rank]
        if not is_sent[expert]:
            continue
        for rank in range(world_size):
            if from_peer[expert, rank]:
                kind = int(node[source] != node[rank])
                sent[kind, source] += 1
                received[kind, rank] += 1
                if linked:
                    _add_way(link_busy_s, links, source, rank)
    mean_s = costs.peer_fetch_s - costs.exchange_latency_s
    expert_s = (mean_s * costs.inside_share, mean_s * costs.network_share)
    through_s = np.zeros(world_size)
    for expert in range(num_experts):
        if not is_sent[expert]:
            continue
        source = home[expert]
        for rank in range(world_size):
            if not from_peer[expert, rank]:
                continue
            kind = int(node[source] != node[rank])
            most = max(sent[kind, source], received[kind, rank])
            way_s = max(float(most), costs.pair_share) * expert_s[kind]
            if linked:
                way_s = _way_s(link_busy_s, links, source, rank, 0.0)
            for end in (source, rank):
                through_s[end] = max(through_s[end], costs.exchange_latency_s + way_s)
    return np.where(received.sum(axis=0) > 0, through_s, 0.0)
