"""Evens ranks out by predicted time: the slowest gives to whoever is ready first."""

from __future__ import annotations

import numpy as np

from harmoeny.cells import executed_by, largest_at
from harmoeny.compiled import borrowing, compiled, inlined
from harmoeny.held import Slots
from harmoeny.placement import BoolArray, FloatArray, IntArray
from harmoeny.predict import Costs, Loads, add_slice, fetches_s, loads_of_shares, shared_s, taken_s, work_s

#: Gain of a move below which the greedy loop ends, as a share of the slowest rank's time.
_LEAST_MOVE = 3e-3


@compiled
def level(shares: IntArray, counts: IntArray, resident: BoolArray, slots: Slots, costs: Costs, to_mean: bool) -> None:
    """Let the slowest rank give of its largest expert to whoever is ready first with it, as long as that helps.

    A rank's time is that of its slices, of what copies take from them, and of the rows that it sends or receives, there
    and back. The shares of the fastest prefix of the moves are kept, as the first moves of several equally slow ranks
    do not help by themselves: as many as there are ranks may help nothing.

    Args:
        shares: int64 ``[world_size, num_experts]``; updated.
        counts: int64 ``[world_size, num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks; a fetch into one that is not free is followed by a restore.
        costs: the machine's.
        to_mean: nobody gives or takes beyond the mean, for what would have to travel.
    """
    world_size, num_experts = counts.shape
    loads, seconds = loads_of_shares(counts, shares, costs), np.empty((5, world_size))
    fetches, moves = np.zeros(world_size, dtype=np.int64), np.empty((world_size + num_experts, 4), dtype=np.int64)
    found = np.empty(num_experts, dtype=np.int64)
    _move(shares, counts, resident, loads, seconds[0], seconds[1:], fetches, moves, found, slots, costs, to_mean)


@borrowing
def _move(
    shares: IntArray,
    counts: IntArray,
    resident: BoolArray,
    loads: Loads,
    busy_s: FloatArray,
    parts_s: FloatArray,
    fetches: IntArray,
    moves: IntArray,
    found: IntArray,
    slots: Slots,
    costs: Costs,
    to_mean: bool,
) -> None:
    """Do as :func:`level` says, whose arguments are the others.

    Args:
        shares: int64 ``[world_size, num_experts]``; updated.
        counts: int64 ``[world_size, num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        loads: those of the shares; updated, what own and received rows take apart aside.
        busy_s: float64 ``[world_size]``, as of :func:`_time_rank`; overwritten.
        parts_s: float64 ``[4, world_size]``, likewise.
        fetches: int64 ``[world_size]``, zeros; what ranks fetch is added.
        moves: int64 ``[most_moves, 4]``, expert, giver, receiver and how many; overwritten.
        found: as of :func:`executed_by`.
        slots: of the ranks.
        costs: the machine's.
        to_mean: nobody gives or takes beyond the mean.
    """
    world_size, most_moves = len(counts), len(moves)
    sent, received, work = loads.sent, loads.received, loads.work
    for rank in range(world_size):
        for i in range(executed_by(rank, shares, found)):
            fetches[rank] += not resident[found[i], rank]
        _time_rank(rank, busy_s, parts_s, loads, fetches[rank], slots, costs)
    num_moves = num_kept = 0
    fastest_s = np.inf
    while True:
        exchange_s = computed_s = fetched_s = restored_s = total_s = 0.0
        for rank in range(world_size):
            total_s += busy_s[rank]
            exchange_s = max(exchange_s, parts_s[0, rank])
            computed_s = max(computed_s, parts_s[1, rank])
            fetched_s = max(fetched_s, parts_s[2, rank])
            restored_s = max(restored_s, parts_s[3, rank])
        if costs.idle_speedup > 1:
            computed_s = shared_s(parts_s[1], computed_s, costs)
        end_s = max(exchange_s + max(exchange_s + computed_s, fetched_s), restored_s)
        if end_s < fastest_s * (1 - _LEAST_MOVE):
            fastest_s, num_kept = end_s, num_moves
        if num_moves == most_moves or num_moves - num_kept > world_size:
            break
        giver = largest_at(busy_s)
        expert = largest_at(shares[giver])
        mean_s = total_s / world_size if to_mean else np.inf
        receiver, amount = _receiver(
            giver, expert, shares, counts, resident, busy_s, mean_s, fetches, slots.number, costs
        )
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
            _time_rank(rank, busy_s, parts_s, loads, fetches[rank], slots, costs)
        moves[num_moves, 0], moves[num_moves, 1] = expert, giver
        moves[num_moves, 2], moves[num_moves, 3] = receiver, amount
        num_moves += 1
    for i in range(num_moves - 1, num_kept - 1, -1):
        expert, giver, receiver, amount = moves[i, 0], moves[i, 1], moves[i, 2], moves[i, 3]
        shares[giver, expert] += amount
        shares[receiver, expert] -= amount


@inlined
def _time_rank(
    rank: int, busy_s: FloatArray, parts_s: FloatArray, loads: Loads, num_fetches: int, slots: Slots, costs: Costs
) -> None:
    """Work out a rank's time anew.

    Args:
        rank: the rank.
        busy_s: float64 ``[world_size]``, its slices and rows, there and back; updated.
        parts_s: float64 ``[4, world_size]``, its rows one way, its slices with what copies take from them, its fetches
            and its restores; updated.
        loads: what the ranks do.
        num_fetches: experts that it fetches.
        slots: of the ranks.
        costs: the machine's.
    """
    parts_s[0, rank] = costs.exchange_token_s * max(loads.sent[rank], loads.received[rank])
    restored = min(num_fetches, slots.number[rank]) - slots.free[rank]
    parts_s[1, rank] = work_s(loads.work, rank, costs) + taken_s(num_fetches, restored, costs)
    parts_s[2, rank] = fetches_s(num_fetches, costs)
    parts_s[3, rank] = restored * costs.fetch_s
    busy_s[rank] = parts_s[1, rank] + 2 * parts_s[0, rank]


@inlined
def _receiver(
    giver: int,
    expert: int,
    shares: IntArray,
    counts: IntArray,
    resident: BoolArray,
    busy_s: FloatArray,
    mean_s: float,
    fetches: IntArray,
    slots: IntArray,
    costs: Costs,
) -> tuple[int, int]:
    """Return who takes how much of the giver's assignments of an expert; (-1, 0) where nobody gains.

    A receiver's own assignments come first: the rows stay where they are. Giver and receiver are made equally busy,
    and whoever ends first then is chosen. Nobody fetches more from the host than it has slots for.
    """
    row_s, token_s = costs.exchange_token_s, costs.token_s
    full = costs.peer_fetch_s <= 0
    best, best_amount, best_s = -1, 0, busy_s[giver] * (1 - _LEAST_MOVE)
    for rank in range(len(busy_s)):
        new = shares[rank, expert] == 0
        fetched = new and not resident[expert, rank]
        begin_s = busy_s[rank] + (costs.launch_s if fetched or (new and costs.grouped == 0) else 0.0)
        if fetched:
            begin_s += taken_s(1, 0, costs)
        gap_s = busy_s[giver] - begin_s
        # Nobody ends before it begins, so most are out already.
        if begin_s >= best_s or rank == giver or (fetched and full and fetches[rank] >= slots[rank]):
            continue
        own = max(counts[rank, expert] - shares[rank, expert], 0)
        # The giver is rid of a row and its results, and so is a receiver of its own; of others' it gets them.
        even = gap_s / (2 * token_s + 2 * row_s)
        if even > own:
            even = own + (gap_s - own * (2 * token_s + 2 * row_s)) / (2 * token_s + 4 * row_s)
        # Nobody ends on the other side of the mean, where others wait to give or to take as well; but what need not
        # travel lowers the mean.
        if mean_s < np.inf:
            at_mean = (busy_s[giver] - mean_s) / (token_s + 2 * row_s)
            if begin_s < mean_s:
                at_mean = min(at_mean, own + (mean_s - begin_s - own * token_s) / (token_s + 2 * row_s))
            even = min(even, max(at_mean, float(own)))
        amount = min(int(even), shares[giver, expert])
        if amount <= 0:
            continue
        giver_s = busy_s[giver] - amount * (token_s + 2 * row_s)
        receiver_s = begin_s + amount * token_s + 2 * row_s * max(amount - own, 0)
        if fetched:
            receiver_s = max(receiver_s, fetches_s(fetches[rank] + 1, costs) + amount * token_s)
        end_s = max(giver_s, receiver_s)
        if end_s < best_s:
            best, best_amount, best_s = rank, amount, end_s
    return best, best_amount
