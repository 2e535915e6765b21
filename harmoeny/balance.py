"""Shares of a batch by predicted time: who executes how much of which expert, so that the slowest rank is fastest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray
from harmoeny.plan import home_tokens, tokens_of_shares
from harmoeny.predict import (
    Costs,
    FloatArray,
    Loads,
    add_slice,
    choose_sources,
    layer_s,
    loads_at_home,
    loads_of_shares,
    no_sources,
    work_s,
)

#: What a plan has to gain on executing everything where it is held, as a share of that time; less is noise.
LEAST_GAIN = 0.02
#: Gain of a move below which the greedy loop ends, as a share of the slowest rank's time.
_LEAST_MOVE = 3e-3
#: The most experts that are brought to all ranks.
_MOST_SPREAD = 32


class Chosen(NamedTuple):
    """What was decided.

    Attributes:
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        from_peer: bool ``[num_experts, world_size]``, the fetches that an expert's home rank sends.
        overlapped: whether a rank's own rows are executed while the others are on their way.
        predicted_s: seconds from the plan to the end of the combine.
    """

    shares: IntArray
    from_peer: BoolArray
    overlapped: bool
    predicted_s: float


@compiled
def plan_by_time(
    counts: IntArray, home: IntArray, resident: BoolArray, free_slots: IntArray, costs: Costs, overlap: bool
) -> tuple[IntArray, BoolArray, BoolArray, bool, float]:
    """Plan a batch; where nothing can be gained, everything goes home and little is computed.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        free_slots: int64 ``[world_size]``, slots of every rank that hold no resident.
        costs: the machine's.
        overlap: exchange and computation may overlap.

    Returns:
        Tokens, int64 ``[world_size, num_experts, world_size]``; fetches, bool ``[num_experts, world_size]``; and of
        :class:`Chosen` the last three.
    """
    world_size, num_experts = counts.shape
    fetch = np.zeros((num_experts, world_size), dtype=np.bool_)
    if resident.sum() == num_experts:
        loads = loads_at_home(counts, home, costs)
        overlapped, predicted_s = _overlapped(layer_s(loads, no_sources(world_size, 0), costs), overlap)
        most_spread = _most_spread(free_slots, predicted_s, costs)
        if _uneven_s(loads, costs) + _spread_s(counts, home, most_spread, costs) <= LEAST_GAIN * predicted_s:
            return home_tokens(counts, home), fetch, fetch, overlapped, predicted_s
    chosen = choose_shares(counts, home, resident, free_slots, costs, overlap)
    shares = np.empty((num_experts, world_size), dtype=np.int64)
    for rank in range(world_size):
        for expert in range(num_experts):
            shares[expert, rank] = chosen.shares[rank, expert]
            fetch[expert, rank] = shares[expert, rank] > 0 and not resident[expert, rank]
    return tokens_of_shares(counts, shares), fetch, chosen.from_peer, chosen.overlapped, chosen.predicted_s


@compiled
def choose_shares(
    counts: IntArray, home: IntArray, resident: BoolArray, free_slots: IntArray, costs: Costs, overlap: bool
) -> Chosen:
    """Choose shares of a batch.

    The first candidate executes everything where it is held; in the second the slowest rank has given assignments of
    its largest expert to the rank that is ready first, again and again (:func:`level`). In the third, before that, the
    experts with most assignments were brought to all ranks, which execute their own assignments of them: that saves the
    exchange of their rows. What is predicted to be fastest is taken, if it gains enough on the first; candidates that
    cannot are not made.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        free_slots: int64 ``[world_size]``, slots of every rank that hold no resident.
        costs: the machine's.
        overlap: exchange and computation may overlap.
    """
    held = shares_where_held(counts, home, resident, costs)
    loads, nothing = loads_of_shares(counts, held, costs), no_sources(len(counts), len(home))
    overlapped, predicted_s = _overlapped(layer_s(loads, nothing, costs), overlap)
    best = Chosen(held, nothing.from_peer, overlapped, predicted_s)
    least_s = (1 - LEAST_GAIN) * predicted_s
    uneven_s, most_spread = _uneven_s(loads, costs), _most_spread(free_slots, predicted_s, costs)
    num_spread, hottest = 0, np.zeros(0, dtype=np.int64)
    if uneven_s + _spread_s(counts, home, most_spread, costs) > predicted_s - least_s:
        hottest = np.argsort(-counts.sum(axis=0), kind="mergesort")[:most_spread]
        num_spread = _num_spread(hottest, counts, held, resident, free_slots, costs)
    for number in (0, num_spread):
        if number == 0 and uneven_s <= predicted_s - least_s:
            continue
        shares = held.copy()
        for expert in hottest[:number]:
            shares[:, expert] = counts[:, expert]
        level(shares, counts, resident, costs)
        chosen = _weighed(shares, counts, home, resident, free_slots, costs, overlap)
        if chosen.predicted_s < least_s:
            best, least_s = chosen, chosen.predicted_s
        if num_spread == 0:
            break
    return best


@compiled
def _weighed(
    shares: IntArray,
    counts: IntArray,
    home: IntArray,
    resident: BoolArray,
    free_slots: IntArray,
    costs: Costs,
    overlap: bool,
) -> Chosen:
    """Return shares with the sources of their fetches and their time."""
    sources = choose_sources(shares, home, resident, free_slots, costs)
    loads = loads_of_shares(counts, shares, costs)
    overlapped, predicted_s = _overlapped(layer_s(loads, sources, costs), overlap)
    return Chosen(shares, sources.from_peer, overlapped, predicted_s)


@compiled
def _overlapped(seconds: tuple[float, float], overlap: bool) -> tuple[bool, float]:
    """Return whether exchange and computation should overlap, of the times without and with that, and the time then."""
    plain_s, overlapped_s = seconds
    if overlap and overlapped_s < (1 - LEAST_GAIN) * plain_s:
        return True, overlapped_s
    return False, plain_s


@compiled
def _fastest_fetch_s(costs: Costs) -> float:
    """Return how long a fetch takes from the faster source, if that is idle."""
    return costs.fetch_s if costs.peer_fetch_s <= 0 else min(costs.fetch_s, costs.peer_fetch_s)


@compiled
def _most_spread(free_slots: IntArray, predicted_s: float, costs: Costs) -> int:
    """Return how many experts a rank can fetch at most if its host link is to be through with the restores in time."""
    return int(min(_MOST_SPREAD, int(predicted_s / costs.fetch_s) + free_slots.max()))


@compiled
def _uneven_s(loads: Loads, costs: Costs) -> float:
    """Return by how much the slowest rank is slower than the mean: the most that evening out can gain."""
    latest_s = total_s = 0.0
    for rank in range(len(loads.sent)):
        rows = max(loads.sent[rank], loads.received[rank])
        busy_s = work_s(loads.work, rank, costs) + 2 * costs.exchange_token_s * rows
        latest_s = max(latest_s, busy_s)
        total_s += busy_s
    return latest_s - total_s / len(loads.sent)


@compiled
def _spread_s(counts: IntArray, home: IntArray, most_spread: int, costs: Costs) -> float:
    """Return the most that spreading so many experts can gain: each saves what a rank sends of its largest at most."""
    largest = 0
    for rank in range(len(counts)):
        for expert in range(len(home)):
            if home[expert] != rank:
                largest = max(largest, counts[rank, expert])
    return 2 * (costs.exchange_token_s + costs.copy_token_s) * most_spread * largest


@compiled
def _num_spread(
    hottest: IntArray, counts: IntArray, held: IntArray, resident: BoolArray, free_slots: IntArray, costs: Costs
) -> int:
    """Return how many of the hottest experts should be brought to all ranks, if :func:`level` then evens out perfectly.

    Args:
        hottest: int64, the candidates in order.
        counts: int64 ``[world_size, num_experts]``.
        held: int64 ``[world_size, num_experts]``, shares without that.
        resident: bool ``[num_experts, world_size]``.
        free_slots: int64 ``[world_size]``.
        costs: the machine's.
    """
    world_size = len(counts)
    row_s = 2 * (costs.exchange_token_s + costs.copy_token_s)
    fetch_s = _fastest_fetch_s(costs)
    fetches = np.zeros(world_size, dtype=np.int64)
    saved_s = best_saved_s = 0.0
    even_s = counts.sum() * (costs.token_s + row_s) / world_size
    best = 0
    for number, expert in enumerate(hottest):
        rows = launches = 0
        for rank in range(world_size):
            own = counts[rank, expert]
            rows += max(own - held[rank, expert], 0)
            if own > 0 and not resident[expert, rank]:
                fetches[rank] += 1
                launches += 1
        saved_s += (rows * row_s - launches * (costs.launch_s + costs.weights_s)) / world_size
        link_s = 0.0
        for rank in range(world_size):
            restores = max(fetches[rank] - free_slots[rank], 0)
            link_s = max(link_s, max(restores * costs.fetch_s, fetches[rank] * fetch_s))
        net_s = saved_s - max(0.0, link_s - (even_s - saved_s))
        if net_s > best_saved_s:
            best, best_saved_s = number + 1, net_s
    return best


@compiled
def shares_where_held(counts: IntArray, home: IntArray, resident: BoolArray, costs: Costs) -> IntArray:
    """Execute assignments where they are if the rank holds the expert, else on the least loaded rank that does.

    An expert with so few assignments that they take less time than its launch and its weights is executed at home.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        costs: the machine's.

    Returns:
        int64 ``[world_size, num_experts]``, assignments that every rank executes.
    """
    world_size, num_experts = counts.shape
    shares = np.zeros((world_size, num_experts), dtype=np.int64)
    load = np.zeros(world_size, dtype=np.int64)
    split = np.zeros(num_experts, dtype=np.bool_)
    slice_s = costs.weights_s if costs.grouped else costs.launch_s + costs.weights_s
    for expert in range(num_experts):
        copies = total = 0
        for rank in range(world_size):
            copies += resident[expert, rank]
            total += counts[rank, expert]
        split[expert] = copies > 1 and total * costs.token_s > slice_s
        if not split[expert]:
            shares[home[expert], expert] = total
            load[home[expert]] += total
    for expert in range(num_experts):
        if not split[expert]:
            continue
        left = 0
        for rank in range(world_size):
            if resident[expert, rank]:
                shares[rank, expert] = counts[rank, expert]
                load[rank] += counts[rank, expert]
            else:
                left += counts[rank, expert]
        _fill(shares[:, expert], load, resident[expert], left)
    return shares


@compiled
def _fill(share: IntArray, load: IntArray, holds: BoolArray, left: int) -> None:
    """Give what is left of an expert to its holders with the least load, evening out their loads as water does."""
    world_size = len(load)
    order = np.argsort(load, kind="mergesort")
    taking = below = 0
    for i in range(world_size):
        rank = order[i]
        if not holds[rank]:
            continue
        if taking > 0 and load[rank] * taking - below >= left:
            break
        taking += 1
        below += load[rank]
    even, extra = divmod(below + left, max(taking, 1))
    given = 0
    for i in range(world_size):
        rank = order[i]
        if holds[rank] and given < taking:
            amount = even + (1 if given < extra else 0) - load[rank]
            share[rank] += amount
            load[rank] += amount
            given += 1


@compiled
def level(shares: IntArray, counts: IntArray, resident: BoolArray, costs: Costs) -> None:
    """Let the slowest rank give of its largest expert to whoever is ready first with it, as long as that helps.

    A rank's time is that of its slices and of the rows that it sends or receives, there and back. The shares of the
    fastest prefix of the moves are kept, as the first moves of several equally slow ranks do not help by themselves.

    Args:
        shares: int64 ``[world_size, num_experts]``; updated.
        counts: int64 ``[world_size, num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        costs: the machine's.
    """
    world_size, num_experts = counts.shape
    row_s = costs.exchange_token_s
    fetch_s = _fastest_fetch_s(costs)
    loads = loads_of_shares(counts, shares, costs)
    sent, received, work = loads.sent, loads.received, loads.work
    busy_s, fetches = np.zeros(world_size), np.zeros(world_size, dtype=np.int64)
    for rank in range(world_size):
        for expert in range(num_experts):
            fetches[rank] += shares[rank, expert] > 0 and not resident[expert, rank]
    most_moves = world_size + num_experts
    moves = np.empty((most_moves, 4), dtype=np.int64)
    num_moves = num_kept = 0
    fastest_s = np.inf
    while True:
        exchange_s = computed_s = fetched_s = 0.0
        for rank in range(world_size):
            there_s = row_s * max(sent[rank], received[rank])
            rank_s = work_s(work, rank, costs)
            busy_s[rank] = rank_s + 2 * there_s
            exchange_s = max(exchange_s, there_s)
            computed_s = max(computed_s, rank_s)
            fetched_s = max(fetched_s, fetches[rank] * fetch_s)
        end_s = exchange_s + max(exchange_s + computed_s, fetched_s)
        if end_s < fastest_s * (1 - _LEAST_MOVE):
            fastest_s, num_kept = end_s, num_moves
        if num_moves == most_moves:
            break
        giver = int(busy_s.argmax())
        expert = int(shares[giver].argmax())
        receiver, amount = _receiver(giver, expert, shares, counts, resident, busy_s, fetches, fetch_s, costs)
        if receiver < 0:
            break
        fetches[receiver] += shares[receiver, expert] == 0 and not resident[expert, receiver]
        for rank, change in ((giver, -amount), (receiver, amount)):
            own, before = counts[rank, expert], shares[rank, expert]
            after = before + change
            received[rank] += max(after - own, 0) - max(before - own, 0)
            sent[rank] += max(own - after, 0) - max(own - before, 0)
            add_slice(work, rank, before, -1, costs)
            add_slice(work, rank, after, 1, costs)
            shares[rank, expert] = after
        moves[num_moves] = (expert, giver, receiver, amount)
        num_moves += 1
    for i in range(num_moves - 1, num_kept - 1, -1):
        expert, giver, receiver, amount = moves[i]
        shares[giver, expert] += amount
        shares[receiver, expert] -= amount


@compiled
def _receiver(
    giver: int,
    expert: int,
    shares: IntArray,
    counts: IntArray,
    resident: BoolArray,
    busy_s: FloatArray,
    fetches: IntArray,
    fetch_s: float,
    costs: Costs,
) -> tuple[int, int]:
    """Return who takes how much of the giver's assignments of an expert; (-1, 0) where nobody gains.

    A receiver's own assignments come first: the rows stay where they are. Giver and receiver are made equally busy,
    and whoever ends first then is chosen.
    """
    row_s, token_s = costs.exchange_token_s, costs.token_s
    best, best_amount, best_s = -1, 0, busy_s[giver] * (1 - _LEAST_MOVE)
    for rank in range(len(busy_s)):
        new = shares[rank, expert] == 0
        fetched = new and not resident[expert, rank]
        begin_s = busy_s[rank] + (costs.launch_s if fetched or (new and costs.grouped == 0) else 0.0)
        gap_s = busy_s[giver] - begin_s
        if gap_s <= 0 or rank == giver:
            continue
        own = max(counts[rank, expert] - shares[rank, expert], 0)
        # The giver is rid of a row and its results, and so is a receiver of its own; of others' it gets them.
        even = gap_s / (2 * token_s + 2 * row_s)
        if even > own:
            even = own + (gap_s - own * (2 * token_s + 2 * row_s)) / (2 * token_s + 4 * row_s)
        amount = min(int(even), shares[giver, expert])
        if amount <= 0:
            continue
        giver_s = busy_s[giver] - amount * (token_s + 2 * row_s)
        receiver_s = begin_s + amount * token_s + 2 * row_s * max(amount - own, 0)
        if fetched:
            receiver_s = max(receiver_s, (fetches[rank] + 1) * fetch_s + amount * token_s)
        end_s = max(giver_s, receiver_s)
        if end_s < best_s:
            best, best_amount, best_s = rank, amount, end_s
    return best, best_amount
