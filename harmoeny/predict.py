"""Predicts how long a MoE layer takes on its slowest rank, from who executes what and from the machine's costs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.cells import executed_by, largest
from harmoeny.compiled import borrowing, compiled, inlined
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, FloatArray, IntArray


class Costs(NamedTuple):
    """What a plan costs, in seconds; the fields of :class:`harmoeny.cost.ExpertCost` of the same names.

    Attributes:
        token_s: executing one more assignment.
        launch_s: a slice, whatever its assignments; all slices of a rank together where they are grouped.
        weights_s: reading an expert's weights, below which no slice's computation is.
        exchange_token_s: sending or receiving one more row.
        fetch_s: fetching an expert from host memory; fetches of one rank follow each other.
        peer_fetch_s: fetching one from another rank, which sends to one after the other; 0: that is not possible.
        exchange_latency_s: an exchange, whatever its rows.
        copy_token_s: reordering one row in device memory.
        tile_tokens: assignments that are computed at a time; no seconds.
        grouped: 1 where all slices of a rank are computed at once, else 0; no seconds.
        node_ranks: ranks of a node, where there are several nodes; 0: there is one.
        inside_share: what a row or an expert inside a node takes, as a multiple of the mean above; no seconds.
        network_share: likewise between nodes, which is beside that.
        pair_share: what a single expert takes from one rank to another, as a multiple of the mean of the many that a
            rank sends to all others at once, over links of their own; no seconds.
        relays: 1 where ranks that fetch an expert hand it on to others, else 0; no seconds.
        copy_share: share of a copy's time from host memory that it takes from its rank's computation; no seconds.
        idle_speedup: how many times as fast a rank computes while all others are idle; no seconds.
        halves: 1 where a fetch may come half from host memory and half from another rank, else 0; no seconds.
        early_s: executing rows before there is a plan, beside their products.
    """

    token_s: float
    launch_s: float
    weights_s: float
    exchange_token_s: float
    fetch_s: float
    peer_fetch_s: float
    exchange_latency_s: float
    copy_token_s: float
    tile_tokens: float
    grouped: float
    node_ranks: float
    inside_share: float
    network_share: float
    pair_share: float
    relays: float = 0.0
    copy_share: float = 0.0
    idle_speedup: float = 1.0
    halves: float = 0.0
    early_s: float = 0.0


#: Rows of what ranks compute, float64 ``[3, world_size]``: the number of slices, the time of their assignments with
#: what fills up their tiles, and the time of the slices one after the other. One array, since numba counts references.
SLICES, TOKENS_S, ALONE_S = 0, 1, 2


class Loads(NamedTuple):
    """What every rank does in a layer: int64 ``[world_size]`` assignments, float64 ``[3, world_size]`` of computing.

    Attributes:
        routed: those of the rank's own tokens.
        sent: those of them that other ranks execute.
        received: those of other ranks that it executes.
        executed: all that it executes.
        work: computing them, an expert's together; rows as ``SLICES``, ``TOKENS_S`` and ``ALONE_S`` say.
        own: computing its own rows alone.
        others: computing the received rows alone.
    """

    routed: IntArray
    sent: IntArray
    received: IntArray
    executed: IntArray
    work: FloatArray
    own: FloatArray
    others: FloatArray


class Sources(NamedTuple):
    """Where a plan's fetches come from.

    Attributes:
        from_peer: bool ``[num_experts, world_size]``, the fetches that other ranks send.
        senders: int64 ``[num_experts, world_size]``, who sends them, -1 where nobody does; of no size: home ranks.
        halved: bool ``[num_experts, world_size]``, of which only half, and the rest the host; of no size: none.
        ready_s: float64 ``[world_size]``, when a rank's last fetch is there, counted from the plan.
        host_link_s: float64 ``[world_size]``, how long its host link is busy, restores included.
        fetched: float64 ``[3, world_size]``, computing the fetched experts; rows as of :class:`Loads`.
        fetched_own: likewise, its own rows of them alone.
        fetched_others: likewise, the received rows alone.
        joins: bool ``[world_size]``, whether there is a slot for each of them before any resident is executed.
        turns: int64 ``[world_size]``, how often all slots are filled for them; 0 where nothing is fetched.
        waiting: float64 ``[world_size]``, fetches from the host that cannot begin before a resident was executed.
        makes_room: float64 ``[3, world_size]``, computing the resident with the fewest assignments, which is then
            executed first; rows as of :class:`Loads`.
    """

    from_peer: BoolArray
    senders: IntArray
    halved: BoolArray
    ready_s: FloatArray
    host_link_s: FloatArray
    fetched: FloatArray
    fetched_own: FloatArray
    fetched_others: FloatArray
    joins: BoolArray
    turns: IntArray
    waiting: FloatArray
    makes_room: FloatArray


def machine_costs(cost: ExpertCost) -> Costs:
    """Return what calibration knows as costs; fetches take as long as they do while all ranks fetch."""
    known = {name: float(getattr(cost, name)) for name in Costs._fields if name != "halves"}
    return Costs(**known | {"fetch_s": max(cost.fetch_s, cost.fetch_together_s)}, halves=1.0)


@compiled
def costs_of(values: FloatArray) -> Costs:
    """Return float64 ``[19]``, numbers in their order, as costs."""
    return Costs(
        values[0], values[1], values[2], values[3], values[4], values[5], values[6],
        values[7], values[8], values[9], values[10], values[11], values[12], values[13], values[14],
        values[15], values[16], values[17], values[18],
    )  # fmt: skip


@borrowing
def fetches_s(number: int, costs: Costs) -> float:
    """Return how long a rank takes to fetch so many experts from the faster source, if that is idle."""
    host_s = number * costs.fetch_s
    if costs.peer_fetch_s <= 0 or number == 0:
        return host_s
    expert_s = costs.peer_fetch_s - costs.exchange_latency_s
    return float(min(host_s, costs.exchange_latency_s + max(float(number), costs.pair_share) * expert_s))


@inlined
def taken_s(num_fetches: int, num_restores: int, costs: Costs) -> float:
    """Return what copies from host memory take from their rank's computation."""
    return costs.copy_share * (num_fetches + max(num_restores, 0)) * costs.fetch_s


@inlined
def add_slice(work: FloatArray, rank: int, num_tokens: int, times: int, costs: Costs) -> None:
    """Add a slice of so many assignments to a rank's work, or take it away; none are no slice.

    Args:
        work: updated.
        rank: whose.
        num_tokens: assignments.
        times: 1 to add it, -1 to take it away.
        costs: the machine's.
    """
    if num_tokens == 0:
        return
    tokens_s = num_tokens * costs.token_s
    if costs.tile_tokens > 1:
        tokens_s = np.ceil(num_tokens / costs.tile_tokens) * costs.tile_tokens * costs.token_s
    work[SLICES, rank] += times
    work[TOKENS_S, rank] += times * tokens_s
    work[ALONE_S, rank] += times * (costs.launch_s + max(tokens_s, costs.weights_s))


@inlined
def work_s(work: FloatArray, rank: int, costs: Costs) -> float:
    """Return how long a rank computes, in seconds: slice after slice, or all at once where they are grouped."""
    if costs.grouped == 0:
        return float(work[ALONE_S, rank])
    if work[SLICES, rank] == 0:
        return 0.0
    return float(costs.launch_s + max(work[TOKENS_S, rank], work[SLICES, rank] * costs.weights_s))


@inlined
def rest_s(work: FloatArray, part: FloatArray, rank: int, costs: Costs) -> float:
    """Return how long a rank computes what is left of its work without a part of it."""
    if costs.grouped == 0:
        return float(work[ALONE_S, rank] - part[ALONE_S, rank])
    slices = work[SLICES, rank] - part[SLICES, rank]
    if slices == 0:
        return 0.0
    return float(costs.launch_s + max(work[TOKENS_S, rank] - part[TOKENS_S, rank], slices * costs.weights_s))


@compiled
def no_loads(world_size: int) -> Loads:
    """Return the loads of ranks that do nothing."""
    counts = np.zeros((4, world_size), dtype=np.int64)
    seconds = np.zeros((3, 3, world_size))
    return Loads(counts[0], counts[1], counts[2], counts[3], seconds[0], seconds[1], seconds[2])


@compiled
def loads_at_home(counts: IntArray, total: IntArray, home: IntArray, costs: Costs) -> Loads:
    """Return the loads where every assignment is executed on its expert's home rank.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        total: int64 ``[num_experts]``, their sums.
        home: int64 ``[num_experts]``.
        costs: the machine's.
    """
    loads = no_loads(len(counts))
    _add_at_home(loads, counts, total, home, costs)
    return loads


@borrowing
def _add_at_home(loads: Loads, counts: IntArray, total: IntArray, home: IntArray, costs: Costs) -> None:
    """Add to ``loads``; arguments as of :func:`loads_at_home`."""
    world_size, num_experts = counts.shape
    for rank in range(world_size):
        routed = 0
        for expert in range(num_experts):
            routed += counts[rank, expert]
        loads.routed[rank] = loads.sent[rank] = routed
    for expert in range(num_experts):
        rank = home[expert]
        own = counts[rank, expert]
        loads.sent[rank] -= own
        loads.received[rank] += total[expert] - own
        loads.executed[rank] += total[expert]
        add_slice(loads.work, rank, total[expert], 1, costs)
        add_slice(loads.own, rank, own, 1, costs)
        add_slice(loads.others, rank, total[expert] - own, 1, costs)


@compiled
def loads_of_shares(counts: IntArray, shares: IntArray, costs: Costs) -> Loads:
    """Return the loads of shares.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        costs: the machine's.
    """
    loads = no_loads(len(counts))
    _add_shares(loads, counts, shares, np.empty(counts.shape[1], dtype=np.int64), costs)
    return loads


@borrowing
def _add_shares(loads: Loads, counts: IntArray, shares: IntArray, found: IntArray, costs: Costs) -> None:
    """Add to ``loads``; ``found``: as of :func:`executed_by`, the others as of :func:`loads_of_shares`."""
    world_size, num_experts = counts.shape
    for rank in range(world_size):
        routed = received = total = 0
        for expert in range(num_experts):
            routed += counts[rank, expert]
        sent = routed
        for i in range(executed_by(rank, shares, found)):
            own, executed = counts[rank, found[i]], shares[rank, found[i]]
            sent -= min(executed, own)
            total += executed
            add_slice(loads.work, rank, executed, 1, costs)
            add_slice(loads.own, rank, min(executed, own), 1, costs)
            if executed > own:
                received += executed - own
                add_slice(loads.others, rank, executed - own, 1, costs)
        loads.routed[rank], loads.sent[rank] = routed, sent
        loads.received[rank], loads.executed[rank] = received, total


@compiled
def no_senders() -> IntArray:
    """Return the senders where home ranks send everything: of no size."""
    return np.empty((0, 0), dtype=np.int64)


@compiled
def no_halves() -> BoolArray:
    """Return the halves where every fetch has one source: of no size."""
    return np.empty((0, 0), dtype=np.bool_)


@compiled
def no_sources(world_size: int, num_experts: int) -> Sources:
    """Return the sources of a plan that fetches nothing."""
    idle_s = np.zeros(world_size)
    none, joins = np.zeros((num_experts, world_size), dtype=np.bool_), np.ones(world_size, dtype=np.bool_)
    work, turns = np.zeros((3, world_size)), np.zeros(world_size, dtype=np.int64)
    return Sources(none, no_senders(), no_halves(), idle_s, idle_s, work, work, work, joins, turns, idle_s, work)


@borrowing
def rows_s(loads: Loads, costs: Costs) -> float:
    """Return how long an exchange takes: as long as the rank that sends or receives most."""
    rows = max(largest(loads.sent), largest(loads.received))
    return float(costs.exchange_latency_s + rows * costs.exchange_token_s)


@inlined
def shared_s(busy_s: FloatArray, own_s: float, costs: Costs) -> float:
    """Return when a rank has computed where ranks share what computes, and all begin at once.

    Those that are not through have equal parts of it, but none has more than it can use (:attr:`Costs.idle_speedup`).

    Args:
        busy_s: float64 ``[world_size]``, how long every rank would compute if all did as long as it does.
        own_s: the rank's.
        costs: the machine's.
    """
    now_s = through_s = 0.0
    while now_s < own_s:
        number, next_s = 0, own_s
        for rank in range(len(busy_s)):
            if busy_s[rank] > now_s:
                number += 1
                next_s = min(next_s, busy_s[rank])
        through_s += (next_s - now_s) * max(1 / costs.idle_speedup, number / len(busy_s))
        now_s = next_s
    return through_s


@compiled
def layer_s(loads: Loads, sources: Sources, exchange_s: float, costs: Costs) -> tuple[float, float]:
    """Return how long a layer takes from the plan to the end of the combine, in seconds.

    ``exchange there + max over ranks of computation + exchange back``. Fetched experts are computed when the last of
    them is there, and after the others; where slices are grouped, together, or with the others if there are slots for
    them and waiting takes less than a launch. Those from the host that need a resident's slot begin once the one with
    the fewest assignments was executed. Rows are copied when they are sent and, there and back, where they are
    executed, unless all are of one expert; results are copied and added. With overlap, a rank's own rows are computed
    while the others are on their way, and an expert with both is launched twice. A host link that is busy for longer
    than all of that, as restores may keep it, is what the layer takes in the long run. Where the processor copies, its
    rank computes later by :attr:`Costs.copy_share` of that. Where ranks share what computes, each is faster once others
    are through (:func:`shared_s`).

    Args:
        loads: what the ranks do.
        sources: what they fetch.
        exchange_s: what the exchange takes one way.
        costs: the machine's.

    Returns:
        Without overlap of exchange and computation, and with it.
    """
    busy_s = np.empty(len(loads.sent) if costs.idle_speedup > 1 else 0)
    return _layer_s(loads, sources, exchange_s, busy_s, costs)


@borrowing
def _layer_s(
    loads: Loads, sources: Sources, exchange_s: float, busy_s: FloatArray, costs: Costs
) -> tuple[float, float]:
    """Do as :func:`layer_s` says.

    Args:
        loads: what the ranks do.
        sources: what they fetch.
        exchange_s: what the exchange takes one way.
        busy_s: float64 ``[world_size]``, becomes that of :func:`shared_s`; of no size where ranks share nothing.
        costs: the machine's.
    """
    for rank in range(len(busy_s)):
        busy_s[rank] = work_s(loads.work, rank, costs) + costs.copy_share * sources.host_link_s[rank]
    gather_s = largest(loads.routed) * costs.copy_token_s
    plain_s = overlapped_s = 0.0
    for rank in range(len(loads.sent)):
        copied_s = loads.executed[rank] * costs.copy_token_s if loads.work[SLICES, rank] > 1 else 0.0
        lost_s = costs.copy_share * sources.host_link_s[rank]
        arrived_s = gather_s + exchange_s + copied_s
        own_end_s = gather_s + work_s(loads.own, rank, costs)
        all_s, others_s = work_s(loads.work, rank, costs), work_s(loads.others, rank, costs)
        rank_s, split_s = arrived_s + all_s, max(arrived_s, own_end_s) + others_s
        fetched, ready_s = sources.fetched[SLICES, rank], sources.ready_s[rank]
        if fetched > 0:
            turns_s = (sources.turns[rank] - 1) * costs.launch_s if costs.grouped > 0 else 0.0
            held_s = rest_s(loads.work, sources.fetched, rank, costs)
            late_s = _behind_arrival_s(sources, rank, costs)
            there_s = max(ready_s, arrived_s + late_s) if late_s > 0 else ready_s
            rank_s = max(arrived_s + held_s + lost_s, there_s) + work_s(sources.fetched, rank, costs) + turns_s
            # Slots are free for fetches when all rows of their residents were computed.
            own_held_s = gather_s + rest_s(loads.own, sources.fetched_own, rank, costs)
            split_s = max(arrived_s, own_held_s) + rest_s(loads.others, sources.fetched_others, rank, costs) + lost_s
            apart_s = work_s(sources.fetched_own, rank, costs) + work_s(sources.fetched_others, rank, costs)
            there_s = max(ready_s, max(arrived_s, own_held_s) + late_s) if late_s > 0 else ready_s
            split_s = max(split_s, there_s) + apart_s + 2 * turns_s
            if costs.grouped > 0 and sources.joins[rank]:
                rank_s = min(rank_s, max(arrived_s + lost_s, ready_s) + all_s)
                begin_s = max(max(arrived_s, own_end_s) + lost_s, ready_s)
                split_s = min(split_s, begin_s + others_s + costs.launch_s)
        if len(busy_s) > 0:
            faster_s = busy_s[rank] - shared_s(busy_s, busy_s[rank], costs)
            rank_s, split_s = max(rank_s - faster_s, ready_s), max(split_s - faster_s, ready_s)
        plain_s, overlapped_s = max(plain_s, rank_s + copied_s), max(overlapped_s, split_s + copied_s)
    back_s, link_s = exchange_s + 2 * gather_s, largest(sources.host_link_s)
    return max(plain_s + back_s, link_s), max(overlapped_s + back_s, link_s)


@inlined
def _behind_arrival_s(sources: Sources, rank: int, costs: Costs) -> float:
    """Return how long after its rows a rank has the fetches that need the slot of a resident; 0: there are none."""
    if sources.waiting[rank] == 0:
        return 0.0
    return float(work_s(sources.makes_room, rank, costs) + sources.waiting[rank] * costs.fetch_s)
