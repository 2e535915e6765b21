"""Where the weights of fetches come from: the host or other ranks, and when they are there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.cells import executed_by
from harmoeny.compiled import borrowing, compiled, inlined
from harmoeny.cost import Links
from harmoeny.held import Slots
from harmoeny.placement import BoolArray, FloatArray, IntArray
from harmoeny.predict import Costs, Sources, add_slice, no_halves, no_senders
from harmoeny.relay import MOST_RANKS, NOBODY, Queues, choose_sender, idle_queues, occupy, part_sent
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


class _Fetches(NamedTuple):
    """What ranks fetch, as far as that is decided; all but the first three are ``[world_size]``, or its last dimension.

    Attributes:
        from_peer: as of :class:`Sources`.
        senders: likewise; of no size where nobody hands weights on.
        halved: likewise; of no size where nothing may be halved.
        work: float64 ``[3, 3, world_size]``: as of :class:`Sources`, ``fetched``, ``fetched_own`` and
            ``fetched_others``.
        number: int64, how many.
        from_host: int64, how many of them the host sends, or half of them.
        copied: float64, as many experts as the host sends, halves counted as such.
        arrived_s: float64, when all that others hand on is there.
    """

    from_peer: BoolArray
    senders: IntArray
    halved: BoolArray
    work: FloatArray
    number: IntArray
    from_host: IntArray
    copied: FloatArray
    arrived_s: FloatArray


class _Traffic(NamedTuple):
    """How busy ranks and links are with what was decided.

    Attributes:
        sent: float64 ``[2, world_size]``, experts that a rank sends inside its node, and beyond it.
        received: likewise, what it receives.
        link_busy_s: float64 ``[num_links]``, where ranks are joined by links of their own.
        queues: where ranks hand weights on.
        having: int64 ``[world_size]``, who has the present expert; see :func:`choose_sender`.
        heads: int64 ``[world_size]``, likewise.
        since_s: float64 ``[world_size]``, likewise.
    """

    sent: FloatArray
    received: FloatArray
    link_busy_s: FloatArray
    queues: Queues
    having: IntArray
    heads: IntArray
    since_s: FloatArray


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
    relays = costs.relays > 0 and world_size <= MOST_RANKS
    # Few arrays: getting one takes as long as filling it.
    work, passed = np.zeros((4, 3, world_size)), np.zeros((2, 2, world_size))
    numbers, seconds = np.zeros((5, world_size), dtype=np.int64), np.zeros((6, world_size))
    fetches = _Fetches(
        np.zeros((num_experts, world_size), dtype=np.bool_),
        np.full((num_experts, world_size), NOBODY) if relays else no_senders(),
        np.zeros((num_experts, world_size), dtype=np.bool_) if halve else no_halves(),
        work[:3],
        numbers[0],
        numbers[1],
        seconds[0],
        seconds[1],
    )
    traffic = _Traffic(
        passed[0],
        passed[1],
        np.zeros(links.on_way.max() + 1 if linked else 0),
        idle_queues(world_size, links),
        numbers[2],
        numbers[3],
        seconds[2],
    )
    first, receivers, room, fewest = _receivers(shares, resident, slots)
    node = nodes(world_size, costs)
    handed_on, halves = _decide(fetches, traffic, first, receivers, counts, shares, home, node, slots, costs, links)
    halved = fetches.halved if halves else no_halves()
    senders, arrived_s = fetches.senders, fetches.arrived_s
    if not handed_on:
        senders, arrived_s = no_senders(), arrivals_s(fetches.from_peer, halved, home, costs, links)
    ready_s, host_link_s, waiting, turns, makes_room = seconds[3], seconds[4], seconds[5], numbers[4], work[3]
    for rank in range(world_size):
        number, copied, from_host = fetches.number[rank], fetches.copied[rank], fetches.from_host[rank]
        ready_s[rank] = max(copied * costs.fetch_s, arrived_s[rank])
        turns[rank] = -(-number // max(slots.number[rank], 1))
        restores = max(min(number, slots.number[rank]) - slots.free[rank], 0)
        host_link_s[rank] = (copied + restores) * costs.fetch_s
        if from_host > room[rank] + number:
            waiting[rank] = (from_host - room[rank] - number) * copied / from_host
        add_slice(makes_room, rank, fewest[rank], 1, costs)
    joins = room >= 0
    return Sources(
        fetches.from_peer,
        senders,
        halved,
        ready_s,
        host_link_s,
        work[0],
        work[1],
        work[2],
        joins,
        turns,
        waiting,
        makes_room,
    )


@borrowing
def _decide(
    fetches: _Fetches,
    traffic: _Traffic,
    first: IntArray,
    receivers: IntArray,
    counts: IntArray,
    shares: IntArray,
    home: IntArray,
    node: IntArray,
    slots: Slots,
    costs: Costs,
    links: Links,
) -> tuple[bool, bool]:
    """Decide where fetches come from, expert after expert; arguments as of :func:`choose_sources`.

    Args:
        fetches: updated.
        traffic: updated.
        first: as of :func:`_receivers`.
        receivers: likewise.
        counts: int64 ``[world_size, num_experts]``.
        shares: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        node: int64 ``[world_size]``.
        slots: of the ranks.
        costs: the machine's.
        links: between its ranks.

    Returns:
        Whether anybody hands anything on, and whether anything is halved.
    """
    world_size, num_experts = shares.shape
    fetched, own, others = fetches.work[0], fetches.work[1], fetches.work[2]
    from_host, copied, numbers = fetches.from_host, fetches.copied, fetches.number
    sent, received, queues, since_s = traffic.sent, traffic.received, traffic.queues, traffic.since_s
    linked, relays, halve = links.on_way.shape[0] == world_size, fetches.senders.size > 0, fetches.halved.size > 0
    # The latency is that of all that a rank sends together. By kind: inside a node, and between nodes.
    mean_s = costs.peer_fetch_s - costs.exchange_latency_s
    expert_s = (mean_s * costs.inside_share, mean_s * costs.network_share)
    handed_on = halves = False
    for expert in range(num_experts):
        if first[expert] == first[expert + 1]:
            continue
        source = home[expert]
        traffic.having[0], traffic.heads[0], num_having, num_heads, since_s[source] = source, source, 1, 1, 0.0
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
                        rank, 1.0, traffic.having, num_having, traffic.heads, num_heads, since_s, node, queues, costs,
                        links,
                    )  # fmt: skip
                elif linked:
                    end_s = _way_s(traffic.link_busy_s, links, source, rank, 1.0)
                peer_s = costs.exchange_latency_s + end_s
                limit_s = (1 - _LEAST_GAIN) * min(peer_s, copies_s)
                last = place + 1 == first[expert + 1] or node[receivers[place + 1]] != node[rank]
                if halve and last and not full and copies_s - costs.fetch_s / 2 < limit_s:
                    in_turn = max(max(sent[kind, source], received[kind, rank]) + 0.5, 0.5 * costs.pair_share)
                    half_sender, half_end_s = source, in_turn * expert_s[kind]
                    if relays:
                        half_sender, half_end_s = choose_sender(
                            rank, 0.5, traffic.having, num_having, traffic.heads, num_heads, since_s, node, queues,
                            costs, links,
                        )  # fmt: skip
                    elif linked:
                        half_end_s = _way_s(traffic.link_busy_s, links, source, rank, 0.5)
                    if costs.exchange_latency_s + half_end_s < limit_s:
                        part, sender, end_s = 0.5, half_sender, half_end_s
                        peer_s = costs.exchange_latency_s + end_s
                if part == 1.0 and not full and peer_s >= copies_s:
                    part = 0.0
            if part < 1.0:
                from_host[rank] += 1
                copied[rank] += 1.0 - part
            if part > 0.0:
                fetches.from_peer[expert, rank] = True
                if part < 1.0:
                    fetches.halved[expert, rank] = halves = True
                if relays:
                    fetches.senders[expert, rank] = sender
                    handed_on |= sender != source
                    occupy(sender, rank, part, since_s[sender], end_s, node, queues, links)
                    fetches.arrived_s[rank] = max(fetches.arrived_s[rank], peer_s)
                if relays and part == 1.0:
                    since_s[rank] = peer_s
                    if node[rank] != node[source] and (
                        num_having == 1 or node[rank] != node[traffic.having[num_having - 1]]
                    ):
                        traffic.heads[num_heads] = rank
                        num_heads += 1
                    traffic.having[num_having] = rank
                    num_having += 1
                sent[kind, source] += part
                received[kind, rank] += part
                if linked:
                    _add_way(traffic.link_busy_s, links, source, rank, part)
    return handed_on, halves


@compiled
def _receivers(shares: IntArray, resident: BoolArray, slots: Slots) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Return who fetches what.

    Args:
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks.

    Returns:
        int64 ``[num_experts + 2]``, where every expert's receivers begin, then twice their number; int64, all;
        and, int64 ``[world_size]``, the slots that are left for fetches before any resident is executed, less those,
        and the fewest assignments of a resident that is executed.
    """
    world_size, num_experts = shares.shape
    first, of_rank = np.zeros(num_experts + 2, dtype=np.int64), np.zeros((2, world_size), dtype=np.int64)
    room, fewest = of_rank[0], of_rank[1]
    found, lacking = np.empty(num_experts, dtype=np.int64), np.empty((2, shares.size), dtype=np.int64)
    number = 0
    for rank in range(world_size):
        num_executed = executed_by(rank, shares, found)
        room[rank] = slots.number[rank] - num_executed
        for i in range(num_executed):
            if not resident[found[i], rank]:
                lacking[0, number], lacking[1, number] = found[i], rank
                first[found[i] + 2] += 1
                number += 1
            elif fewest[rank] == 0 or shares[rank, found[i]] < fewest[rank]:
                fewest[rank] = shares[rank, found[i]]
    for expert in range(num_experts):
        first[expert + 2] += first[expert + 1]
    receivers = np.empty(number, dtype=np.int64)
    for i in range(number):
        behind = lacking[0, i] + 1  # where the expert's own begin, until they are all there
        receivers[first[behind]] = lacking[1, i]
        first[behind] += 1
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
    for rank in range(world_size):
        if received[0, rank] + received[1, rank] == 0:
            through_s[rank] = 0.0
    return through_s
