"""Where the weights of fetches come from: the host or other ranks, and when they are there."""

from __future__ import annotations

import numpy as np

from harmoeny.cells import executed_by
from harmoeny.compiled import compiled, inlined
from harmoeny.cost import Links
from harmoeny.held import Slots
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs, FloatArray, Sources, add_slice, no_halves, no_senders
from harmoeny.relay import MOST_RANKS, NOBODY, choose_sender, idle_queues, occupy, part_sent
from harmoeny.wire import nodes

#: What halves have to gain on the sooner of both sources, as a share of when that has the expert there.
_LEAST_GAIN = 0.05


@inlined
def _way_s(busy_s: FloatArray, links: Links, src: int, dst: int, times: float) -> float:
    """Return how long the busiest link from rank to rank is busy, with so many more experts."""
    slowest_s = 0.0
    for i in range(links.on_way.shape[2]):
        link = links.on_way[src, dst, i]
        if link >= 0:
            slowest_s = max(slowest_s, busy_s[link] + times * links.seconds[src, dst, i])
    return slowest_s


@inlined
def _add_way(busy_s: FloatArray, links: Links, src: int, dst: int, part: float) -> None:
    """Send so much of one more expert from rank to rank; ``busy_s``: float64 ``[num_links]``, updated."""
    for i in range(links.on_way.shape[2]):
        link = links.on_way[src, dst, i]
        if link >= 0:
            busy_s[link] += part * links.seconds[src, dst, i]


@compiled
def choose_sources(
    counts: IntArray,
    shares: IntArray,
    home: IntArray,
    resident: BoolArray,
    slots: Slots,
    costs: Costs,
    links: Links,
    halve: bool,
) -> Sources:
    """Decide for every fetch which source is less busy: the host's link, with the restores, or a rank that has it.

    That is the expert's home rank and, where ranks hand weights on (:attr:`Costs.relays`), those that get it before.
    Where both take about as long, half may come from either, to ranks behind which nobody of their node wants it: they
    hand it on to nobody.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks; what was in one that is not free has to be restored after a fetch into it.
        costs: the machine's.
        links: between its ranks.
        halve: half may come from either.
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
    sent, received, copied = np.zeros((2, world_size)), np.zeros((2, world_size)), np.zeros(world_size)
    from_host, numbers = np.zeros(world_size, dtype=np.int64), np.zeros(world_size, dtype=np.int64)
    halved = no_halves()
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
        for place in range(first[expert], first[expert + 1]):
            rank = receivers[place]
            share = shares[rank, expert]
            add_slice(fetched, rank, share, 1, costs)
            add_slice(own, rank, min(share, counts[rank, expert]), 1, costs)
            add_slice(others, rank, max(share - counts[rank, expert], 0), 1, costs)
            kind = int(node[source] != node[rank])
            numbers[rank] += 1
            copies_s = (copied[rank] + 1 + max(numbers[rank] - slots.free[rank], 0)) * costs.fetch_s
            full = from_host[rank] >= slots.number[rank]  # weights from peers lie elsewhere until a slot is free
            part, sender, end_s, peer_s = 0.0, source, 0.0, np.inf
            if costs.peer_fetch_s > 0 and source != rank:
                part = 1.0
                in_turn = max(max(sent[kind, source], received[kind, rank]) + 1, costs.pair_share)
                end_s = in_turn * expert_s[kind]
                if relays:
                    sender, end_s = choose_sender(
                        rank, 1.0, having, num_having, heads, num_heads, since_s, node, queues, costs, links
                    )
                elif linked:
                    end_s = _way_s(link_busy_s, links, source, rank, 1.0)
                peer_s = costs.exchange_latency_s + end_s
                limit_s = (1 - _LEAST_GAIN) * min(peer_s, copies_s)
                last = place + 1 == first[expert + 1] or node[receivers[place + 1]] != node[rank]
                if halve and last and not full and copies_s - costs.fetch_s / 2 < limit_s:
                    in_turn = max(max(sent[kind, source], received[kind, rank]) + 0.5, 0.5 * costs.pair_share)
                    half_sender, half_end_s = source, in_turn * expert_s[kind]
                    if relays:
                        half_sender, half_end_s = choose_sender(
                            rank, 0.5, having, num_having, heads, num_heads, since_s, node, queues, costs, links
                        )
                    elif linked:
                        half_end_s = _way_s(link_busy_s, links, source, rank, 0.5)
                    if costs.exchange_latency_s + half_end_s < limit_s:
                        part, sender, end_s = 0.5, half_sender, half_end_s
                        peer_s = costs.exchange_latency_s + end_s
                if part == 1.0 and not full and peer_s >= copies_s:
                    part = 0.0
            if part < 1.0:
                from_host[rank] += 1
                copied[rank] += 1.0 - part
            if part > 0.0:
                from_peer[expert, rank] = True
                if part < 1.0:
                    if halved.size == 0:
                        halved = np.zeros((num_experts, world_size), dtype=np.bool_)
                    halved[expert, rank] = True
                if relays:
                    senders[expert, rank] = sender
                    handed_on |= sender != source
                    occupy(sender, rank, part, since_s[sender], end_s, node, queues, links)
                    arrived_s[rank] = max(arrived_s[rank], peer_s)
                if relays and part == 1.0:
                    since_s[rank] = peer_s
                    if node[rank] != node[source] and (num_having == 1 or node[rank] != node[having[num_having - 1]]):
                        heads[num_heads] = rank
                        num_heads += 1
                    having[num_having] = rank
                    num_having += 1
                sent[kind, source] += part
                received[kind, rank] += part
                if linked:
                    _add_way(link_busy_s, links, source, rank, part)
    if not handed_on:
        senders, arrived_s = no_senders(), arrivals_s(from_peer, halved, home, costs, links)
    ready_s, host_link_s, turns = np.zeros(world_size), np.zeros(world_size), np.zeros(world_size, dtype=np.int64)
    waiting, makes_room = np.zeros(world_size), np.zeros((3, world_size))
    for rank in range(world_size):
        ready_s[rank] = max(copied[rank] * costs.fetch_s, arrived_s[rank])
        number = numbers[rank]
        turns[rank] = -(-number // max(slots.number[rank], 1))
        restores = max(min(number, slots.number[rank]) - slots.free[rank], 0)
        host_link_s[rank] = (copied[rank] + restores) * costs.fetch_s
        if from_host[rank] > room[rank] + number:
            waiting[rank] = (from_host[rank] - room[rank] - number) * copied[rank] / from_host[rank]
        add_slice(makes_room, rank, fewest[rank], 1, costs)
    joins = room >= 0
    return Sources(
        from_peer, senders, halved, ready_s, host_link_s, fetched, own, others, joins, turns, waiting, makes_room
    )


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
def arrivals_s(from_peer: BoolArray, halved: BoolArray, home: IntArray, costs: Costs, links: Links) -> FloatArray:
    """Return float64 ``[world_size]``, when weights that home ranks send are there, from when all begin; 0: nothing is.

    As in any exchange, a rank is through when all that it sends to or receives from are, with what others get too.

    Args:
        from_peer: bool ``[num_experts, world_size]``, what every rank receives.
        halved: likewise, of which only half; of no size: none.
        home: int64 ``[num_experts]``.
        costs: the machine's.
        links: between its ranks.
    """
    num_experts, world_size = from_peer.shape
    node, linked = nodes(world_size, costs), links.on_way.shape[0] == world_size
    link_busy_s = np.zeros(links.on_way.max() + 1 if linked else 0)
    sent, received = np.zeros((2, world_size)), np.zeros((2, world_size))
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
                part = part_sent(halved, expert, rank)
                sent[kind, source] += part
                received[kind, rank] += part
                if linked:
                    _add_way(link_busy_s, links, source, rank, part)
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
            way_s = max(most, costs.pair_share * part_sent(halved, expert, rank)) * expert_s[kind]
            if linked:
                way_s = _way_s(link_busy_s, links, source, rank, 0.0)
            for end in (source, rank):
                through_s[end] = max(through_s[end], costs.exchange_latency_s + way_s)
    return np.where(received.sum(axis=0) > 0, through_s, 0.0)
