"""Which candidates of a plan are worth making: those that may gain more than trying them takes."""

from __future__ import annotations

import numpy as np

from harmoeny.cells import largest, largest_at
from harmoeny.compiled import borrowing, compiled
from harmoeny.held import Slots
from harmoeny.level_nodes import MOST_AT_ONCE
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs, Loads, fetches_s, taken_s, work_s
from harmoeny.weighed import LEAST_GAIN

#: What another candidate has to gain, in seconds per rank and expert: twice what trying it takes
#: (python -m scripts.bench.planning).
TRIAL_S = 2e-8
#: The most experts that are brought to all ranks.
_MOST_SPREAD = 32


@borrowing
def worth_trying(
    totals: IntArray, loads: Loads, single: bool, free: IntArray, predicted_s: float, costs: Costs
) -> tuple[int, int]:
    """Return whether evening out the ranks may gain enough, 1 or 0, and how many experts may be worth spreading.

    Evening out gains no more than what the slowest rank is slower than the mean; if every move needs a fetch, no more
    than what is left of its lead over the fastest rank after that one's launch. No plan with a fetch ends before the
    fetch, and its restore where it overwrote a resident.

    Args:
        totals: int64 ``[num_experts]``, assignments of every expert.
        loads: what the ranks do where everything is executed where it is held.
        single: every expert is held once.
        free: int64 ``[world_size]``, slots that hold no resident.
        predicted_s: the time of that.
        costs: the machine's.
    """
    world_size, num_experts = len(free), len(totals)
    least_gain_s = LEAST_GAIN * predicted_s + TRIAL_S * world_size * num_experts
    most_free = largest(free)
    fetched_s = fetches_s(1, costs) + costs.launch_s + costs.exchange_latency_s
    if most_free == 0:
        fetched_s = max(fetched_s, costs.fetch_s)
    fetches_pay = fetched_s < predicted_s - least_gain_s
    if single and not fetches_pay:
        return 0, 0
    latest_s, total_s, soonest_s = 0.0, 0.0, np.inf
    for rank in range(world_size):
        rows = max(loads.sent[rank], loads.received[rank])
        busy_s = work_s(loads.work, rank, costs) + 2 * costs.exchange_token_s * rows
        latest_s, soonest_s = max(latest_s, busy_s), min(soonest_s, busy_s)
        total_s += busy_s
    # Where ranks share what computes, something idles only while the slowest is as fast as it can be.
    uneven_s = min(latest_s - total_s / world_size, latest_s / costs.idle_speedup)
    if single and (most_free == 0 or costs.grouped == 0):
        uneven_s = min(uneven_s, latest_s - soonest_s - costs.launch_s)
    if not fetches_pay:
        return int(uneven_s > least_gain_s), 0
    # A rank's host link has to be through with the restores when the layer ends.
    most_spread = int(min(_MOST_SPREAD, num_experts, int(predicted_s / costs.fetch_s) + most_free))
    saved_s = 2 * (costs.exchange_token_s + costs.copy_token_s) * most_spread * largest(totals) / world_size
    if max(uneven_s, 0.0) + saved_s <= least_gain_s:
        most_spread = 0
    return int(uneven_s > least_gain_s), most_spread


@compiled
def numbers_spread(
    totals: IntArray,
    most: int,
    counts: IntArray,
    held: IntArray,
    home: IntArray,
    resident: BoolArray,
    slots: Slots,
    costs: Costs,
) -> tuple[IntArray, IntArray]:
    """Return the hottest experts in order, int64 ``[most]``, and int64, how many of them to try to bring to all ranks.

    First comes how many that should be, if :func:`level` then evens out perfectly, and none last. The hottest are known
    as far as the largest of these numbers.

    Args:
        totals: int64 ``[num_experts]``, assignments of every expert.
        most: the most that may be.
        counts: int64 ``[world_size, num_experts]``.
        held: int64 ``[world_size, num_experts]``, shares without that.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks.
        costs: the machine's.
    """
    if most == 0:
        return np.empty(0, dtype=np.int64), np.array([0])
    world_size = len(counts)
    hottest, left = np.empty(most, dtype=np.int64), totals.copy()
    best = _best_number(
        hottest, left, np.zeros((2, world_size), dtype=np.int64), counts, held, home, resident, slots, costs
    )
    if best == 0:
        return hottest, np.array([0])
    # Experts beyond the slots take turns in them: fewer may be faster then.
    fits = min(best, int(slots.number.min()))
    if fits == best or world_size > MOST_AT_ONCE:
        return hottest, np.array([best, 0])
    quarter = best // 4
    return hottest, np.array([best, fits, 0]) if quarter in (0, fits) else np.array([best, fits, quarter, 0])


@borrowing
def _best_number(
    hottest: IntArray,
    left: IntArray,
    moved: IntArray,
    counts: IntArray,
    held: IntArray,
    home: IntArray,
    resident: BoolArray,
    slots: Slots,
    costs: Costs,
) -> int:
    """Return how many experts should be brought to all ranks; arguments as of :func:`numbers_spread`.

    Args:
        hottest: int64 ``[most]``, those that were looked at; overwritten.
        left: int64 ``[num_experts]``, assignments of every expert; updated.
        moved: int64 ``[2, world_size]``, zeros; what ranks fetch and what they send is added.
        counts: int64 ``[world_size, num_experts]``.
        held: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks.
        costs: the machine's.
    """
    world_size, (fetches, sent) = len(counts), moved
    row_s = 2 * (costs.exchange_token_s + costs.copy_token_s)
    expert_s = costs.peer_fetch_s - costs.exchange_latency_s
    launched_s = costs.launch_s + costs.weights_s + taken_s(1, 0, costs)
    best = most_fetched = most_sent = total = 0
    saved_s = best_saved_s = 0.0
    for expert in range(len(left)):
        total += left[expert]
    even_s = total * (costs.token_s + row_s) / world_size
    for number in range(len(hottest)):
        expert = largest_at(left)
        hottest[number], left[expert] = expert, -1
        rows = launches = restores = 0
        fits = True
        for rank in range(world_size):
            own = counts[rank, expert]
            rows += max(own - held[rank, expert], 0)
            if own > 0 and not resident[expert, rank]:
                fetches[rank] += 1
                sent[home[expert]] += 1
                launches += 1
            most_fetched = max(most_fetched, fetches[rank])
            fits &= fetches[rank] <= slots.number[rank]
            restores = max(restores, min(fetches[rank], slots.number[rank]) - slots.free[rank])
        if costs.peer_fetch_s <= 0 and not fits:
            break
        saved_s += (rows * row_s - launches * launched_s) / world_size
        link_s = most_fetched * costs.fetch_s
        if costs.peer_fetch_s > 0 and link_s > 0:  # both sources at once, each at its rate
            most_sent = max(most_sent, sent[home[expert]])
            in_turn = float(max(most_sent, most_fetched))
            if costs.relays > 0:  # a rank hands on what it gets, beside the first rounds of a tree
                in_turn = min(in_turn, most_fetched - 1 + np.ceil(np.log2(world_size)))
            peer_s = in_turn * expert_s
            link_s = peer_s * link_s / (peer_s + link_s)
        late_s = max(link_s, restores * costs.fetch_s) - (even_s - saved_s)
        net_s = saved_s - max(0.0, late_s)
        if net_s > best_saved_s:
            best, best_saved_s = number + 1, net_s
        if late_s > 0:
            break  # with more of them weights are there later still
    return best


@borrowing
def many_stay(loads: Loads) -> bool:
    """Return whether so many assignments are executed where their tokens are that whole experts are among them.

    Of experts in one place as many stay as there are ranks to one; here, an eighth of the others do as well.
    """
    world_size, stay, executed = len(loads.executed), 0, 0
    for rank in range(world_size):
        stay += loads.executed[rank] - loads.received[rank]
        executed += loads.executed[rank]
    return bool(8 * world_size * stay > (world_size + 7) * executed)
