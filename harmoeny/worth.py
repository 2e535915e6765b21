"""Which candidates of a plan are worth making: those that may gain more than trying them takes."""

from __future__ import annotations

import numpy as np

from harmoeny.compiled import compiled
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


@compiled
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
    most_free = free.max()
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
    # Where ranks share what computes, the slowest is faster once others are through.
    uneven_s = max(latest_s / costs.idle_speedup, total_s / world_size) - total_s / world_size
    if single and (most_free == 0 or costs.grouped == 0):
        uneven_s = min(uneven_s, latest_s - soonest_s - costs.launch_s)
    if not fetches_pay:
        return int(uneven_s > least_gain_s), 0
    # A rank's host link has to be through with the restores when the layer ends.
    most_spread = int(min(_MOST_SPREAD, num_experts, int(predicted_s / costs.fetch_s) + most_free))
    saved_s = 2 * (costs.exchange_token_s + costs.copy_token_s) * most_spread * totals.max() / world_size
    if max(uneven_s, 0.0) + saved_s <= least_gain_s:
        most_spread = 0
    return int(uneven_s > least_gain_s), most_spread


@compiled
def hottest_of(totals: IntArray, number: int) -> IntArray:
    """Return int64 ``[number]``, the experts with most assignments (``[num_experts]``), hottest first."""
    left, hottest = totals.copy(), np.empty(number, dtype=np.int64)
    for i in range(number):
        hottest[i] = left.argmax()
        left[hottest[i]] = -1
    return hottest


@compiled
def numbers_spread(
    hottest: IntArray,
    counts: IntArray,
    held: IntArray,
    home: IntArray,
    resident: BoolArray,
    slots: Slots,
    costs: Costs,
) -> IntArray:
    """Return int64, of how many of the hottest experts it is tried to bring them to all ranks, none last.

    First comes how many that should be, if :func:`level` then evens out perfectly.

    Args:
        hottest: int64, the candidates in order.
        counts: int64 ``[world_size, num_experts]``.
        held: int64 ``[world_size, num_experts]``, shares without that.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks.
        costs: the machine's.
    """
    best = 0
    if len(hottest) == 0:
        return np.array([0])
    world_size = len(counts)
    row_s = 2 * (costs.exchange_token_s + costs.copy_token_s)
    expert_s = costs.peer_fetch_s - costs.exchange_latency_s
    fetches, sent = np.zeros(world_size, dtype=np.int64), np.zeros(world_size, dtype=np.int64)
    saved_s = best_saved_s = 0.0
    even_s = counts.sum() * (costs.token_s + row_s) / world_size
    for number, expert in enumerate(hottest):
        rows = launches = 0
        for rank in range(world_size):
            own = counts[rank, expert]
            rows += max(own - held[rank, expert], 0)
            if own > 0 and not resident[expert, rank]:
                fetches[rank] += 1
                sent[home[expert]] += 1
                launches += 1
        if costs.peer_fetch_s <= 0 and (fetches > slots.number).any():
            break
        launched_s = costs.launch_s + costs.weights_s + taken_s(1, 0, costs)
        saved_s += (rows * row_s - launches * launched_s) / world_size
        restores = 0
        for rank in range(world_size):
            restores = max(restores, min(fetches[rank], slots.number[rank]) - slots.free[rank])
        link_s = fetches.max() * costs.fetch_s
        if costs.peer_fetch_s > 0 and link_s > 0:  # both sources at once, each at its rate
            in_turn = max(sent.max(), fetches.max())
            if costs.relays > 0:  # a rank hands on what it gets, beside the first rounds of a tree
                in_turn = min(in_turn, fetches.max() - 1 + np.ceil(np.log2(world_size)))
            peer_s = in_turn * expert_s
            link_s = peer_s * link_s / (peer_s + link_s)
        late_s = max(link_s, restores * costs.fetch_s) - (even_s - saved_s)
        net_s = saved_s - max(0.0, late_s)
        if net_s > best_saved_s:
            best, best_saved_s = number + 1, net_s
        if late_s > 0:
            break  # with more of them weights are there later still
    # Experts beyond the slots take turns in them: fewer may be faster then.
    fits = min(best, int(slots.number.min()))
    if best == 0:
        return np.array([0])
    if fits == best or world_size > MOST_AT_ONCE:
        return np.array([best, 0])
    quarter = best // 4
    return np.array([best, fits, 0]) if quarter in (0, fits) else np.array([best, fits, quarter, 0])


@compiled
def many_stay(loads: Loads) -> bool:
    """Return whether so many assignments are executed where their tokens are that whole experts are among them.

    Of experts in one place as many stay as there are ranks to one; here, an eighth of the others do as well.
    """
    world_size, stay = len(loads.executed), (loads.executed - loads.received).sum()
    return bool(8 * world_size * stay > (world_size + 7) * loads.executed.sum())
