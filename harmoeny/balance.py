"""Plans a batch by predicted time: who executes how much of which expert, so that the slowest rank is fastest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.cells import executed_by, totals_of
from harmoeny.compiled import compiled, inlined
from harmoeny.cost import Links
from harmoeny.held import Slots, shares_at_home, shares_where_held, slots_in
from harmoeny.level_nodes import MOST_AT_ONCE, level_any
from harmoeny.lines import Stages, no_stages
from harmoeny.placement import BoolArray, IntArray
from harmoeny.plan import home_tokens, tokens_of_shares
from harmoeny.predict import (
    Costs,
    FloatArray,
    Loads,
    Sources,
    costs_of,
    fetches_s,
    layer_s,
    loads_at_home,
    loads_of_shares,
    no_sources,
    work_s,
)
from harmoeny.stage_times import soonest_stages, trial_s
from harmoeny.stages import best_stages
from harmoeny.wire import choose_sources, exchange_at_home_s, exchange_s

#: What a plan has to gain on executing everything where it is held, as a share of that time; less is noise.
LEAST_GAIN = 0.02
#: What stages have to gain, likewise: they move nothing, and what they take is predicted more exactly.
LEAST_STAGED_GAIN = 0.01
#: What trying another candidate takes, in seconds per rank and expert (python -m scripts.bench.planning).
TRIAL_S = 2e-8
#: The most experts that are brought to all ranks.
_MOST_SPREAD = 32


class Chosen(NamedTuple):
    """What was decided.

    Attributes:
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first.
        from_peer: bool ``[num_experts, world_size]``, the fetches that other ranks send.
        senders: int64 ``[num_experts, world_size]``, who sends them, -1 where nobody does; of no size: home ranks.
        overlapped: whether a rank's own rows are executed while the others are on their way.
        stages: as of a plan; of no size: there is one.
        predicted_s: seconds from the plan to the end of the combine.
        at_home: whether everything is executed on its home rank because nobody else holds it.
        node_ranks: ranks of a node, whose rows stay on it where they can; 0: nodes do not matter.
    """

    shares: IntArray
    from_peer: BoolArray
    senders: IntArray
    overlapped: bool
    stages: Stages
    predicted_s: float
    at_home: bool
    node_ranks: int


@compiled
def plan_by_time(
    counts: IntArray,
    home: IntArray,
    resident: BoolArray,
    room: int,
    costs: FloatArray,
    on_way: IntArray,
    seconds: FloatArray,
    overlap: bool,
    staged: bool,
    spread: bool,
) -> tuple[IntArray, BoolArray, IntArray, int, bool, float]:
    """Plan a batch; where nothing can be gained, everything is executed where it is held and little is computed.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        room: slots of a rank, never fewer than the experts whose home it is; 0: those.
        costs: float64, the machine's in the order of :class:`Costs`; handing over tuples takes a microsecond each.
        on_way: of the :class:`Links` between its ranks.
        seconds: likewise.
        overlap: a rank's own rows may be executed while the others are on their way.
        staged: rows may be exchanged and executed in stages.
        spread: hot experts may be brought to all ranks.

    Returns:
        Few arrays, as each takes a third of a microsecond. Tokens, int64 ``[world_size, num_experts, world_size]``; bool
        ``[2, num_experts, world_size]``, fetches and those that other ranks send; int64 ``[num_rows, world_size]``, what
        there is of ``begins`` and ``cuts`` of the stages and of the senders, one behind the other; the number of stages,
        0 if there are none; whether a rank's own rows are executed first; and the time that is predicted, in seconds.
    """
    world_size, num_experts = counts.shape
    machine = costs_of(costs)
    chosen = choose_shares(counts, home, resident, room, machine, Links(on_way, seconds), overlap, staged, spread)
    fetches = np.zeros((2, num_experts, world_size), dtype=np.bool_)
    begins, cuts, senders = chosen.stages.begins, chosen.stages.cuts, chosen.senders
    how = np.empty((len(begins) + len(cuts) + len(senders), world_size), dtype=np.int64)
    if len(how) > 0:
        _put_rows(how, begins, 0)
        _put_rows(how, cuts, len(begins))
        _put_rows(how, senders, len(begins) + len(cuts))
    rest = how, max(len(cuts) - 1, 0), chosen.overlapped, chosen.predicted_s
    if chosen.at_home:
        return home_tokens(counts, home), fetches, *rest
    executed, found = np.zeros((num_experts, world_size), dtype=np.int64), np.empty(num_experts, dtype=np.int64)
    for rank in range(world_size):
        for i in range(executed_by(rank, chosen.shares, found)):
            executed[found[i], rank] = chosen.shares[rank, found[i]]
            fetches[0, found[i], rank] = not resident[found[i], rank]
    for expert in range(num_experts):
        for rank in range(world_size):
            fetches[1, expert, rank] = chosen.from_peer[expert, rank]
    return tokens_of_shares(counts, executed, int(machine.node_ranks)), fetches, *rest


@inlined
def _put_rows(rows: IntArray, part: IntArray, first: int) -> None:
    """Copy int64 ``[num_rows, world_size]`` into an array of more rows, from ``first`` on."""
    for i in range(len(part)):
        for rank in range(part.shape[1]):
            rows[first + i, rank] = part[i, rank]


@compiled
def choose_shares(
    counts: IntArray,
    home: IntArray,
    resident: BoolArray,
    room: int,
    costs: Costs,
    links: Links,
    overlap: bool,
    staged: bool,
    spread: bool,
) -> Chosen:
    """Choose shares of a batch.

    The first candidate executes everything where it is held; in the second the slowest rank has given assignments of
    its largest expert to the rank that is ready first, again and again (:func:`level`). In the third, before that, the
    experts with most assignments were brought to all ranks, which execute their own assignments of them: that saves the
    exchange of their rows. Each is weighed with all rows exchanged at once, with a rank's own rows first, and in
    stages. What is predicted to be fastest is taken, if it gains enough on the first; candidates that cannot are
    not made.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        room: slots of a rank, never fewer than the experts whose home it is; 0: those.
        costs: the machine's.
        links: between its ranks.
        overlap: a rank's own rows may be executed while the others are on their way.
        staged: rows may be exchanged and executed in stages.
        spread: hot experts may be brought to all ranks.
    """
    world_size, num_experts = counts.shape
    slots = slots_in(room, home, resident)
    single = (slots.number - slots.free).sum() == num_experts
    totals = totals_of(counts)
    if single:
        held, loads = shares_at_home(totals, home, world_size), loads_at_home(counts, totals, home, costs)
    else:
        held = shares_where_held(counts, totals, home, resident, costs)
        loads = loads_of_shares(counts, held, costs)
    held_s = exchange_at_home_s(counts, home, loads, costs) if single else exchange_s(counts, held, loads, costs)
    first = _weighed(held, loads, no_sources(world_size, num_experts), held_s, costs, overlap, single)
    best, soonest = first, first.chosen
    evens, most_spread = _candidates(totals, loads, single, slots.free, first.chosen.predicted_s, costs)
    # Where ranks are many, and even, nodes hold what their ranks want: another candidate takes longer than it gains.
    if not spread or (evens == 0 and world_size > MOST_AT_ONCE):
        most_spread = 0
    numbers = np.empty(0, dtype=np.int64)
    hottest = _hottest(totals, most_spread)
    if evens > 0 or most_spread > 0:
        numbers = _numbers_spread(hottest, counts, held, home, resident, slots, costs)
        numbers = numbers if evens else numbers[:-1]
    for number in numbers:
        shares = held.copy()
        for i in range(number):
            for rank in range(world_size):
                shares[rank, hottest[i]] = counts[rank, hottest[i]]
        level_any(shares, counts, resident, slots, costs)
        loads = loads_of_shares(counts, shares, costs)
        one_way_s = exchange_s(counts, shares, loads, costs)
        if number != numbers[0]:
            at_best = _weighed(shares, loads, first.sources, one_way_s, costs, overlap, False)
            if at_best.chosen.predicted_s >= best.chosen.predicted_s and at_best.staged_s >= soonest.predicted_s:
                continue  # even if nothing had to be fetched for it
        sources = choose_sources(counts, shares, home, resident, slots, costs, links)
        weighed = _weighed(shares, loads, sources, one_way_s, costs, overlap, False)
        if weighed.chosen.predicted_s < best.chosen.predicted_s:
            best = weighed
        if staged:
            soonest = _sooner(soonest, weighed, best, bool(number > 0), counts, resident, costs)
    if staged:
        soonest = _sooner(soonest, first, best, not single and _many_stay(first.loads), counts, resident, costs)
    if best.chosen.predicted_s >= (1 - LEAST_GAIN) * first.chosen.predicted_s:
        best = first
    return soonest if soonest.predicted_s < (1 - LEAST_STAGED_GAIN) * best.chosen.predicted_s else best.chosen


class _Weighed(NamedTuple):
    """A candidate.

    Attributes:
        chosen: what would be chosen, without stages.
        loads: what the ranks do.
        sources: what they fetch.
        exchange_s: what its exchange takes one way.
        num_stages: how many stages may pay; 1: none.
        staged_s: what it takes in these, if products and exchange overlap as well as they can.
    """

    chosen: Chosen
    loads: Loads
    sources: Sources
    exchange_s: float
    num_stages: int
    staged_s: float


@compiled
def _weighed(
    shares: IntArray, loads: Loads, sources: Sources, one_way_s: float, costs: Costs, overlap: bool, at_home: bool
) -> _Weighed:
    """Return shares with their time; ``one_way_s``: what their exchange takes."""
    plain_s, overlapped_s = layer_s(loads, sources, one_way_s, costs)
    overlapped = overlap and overlapped_s < (1 - LEAST_GAIN) * plain_s
    predicted_s = overlapped_s if overlapped else plain_s
    chosen = Chosen(
        shares, sources.from_peer, sources.senders, overlapped, no_stages(), predicted_s, at_home, int(costs.node_ranks)
    )
    num_stages, gain_s = best_stages(loads, one_way_s, costs)
    return _Weighed(chosen, loads, sources, one_way_s, num_stages, plain_s - gain_s)


@compiled
def _sooner(
    soonest: Chosen,
    weighed: _Weighed,
    best: _Weighed,
    own: bool,
    counts: IntArray,
    resident: BoolArray,
    costs: Costs,
) -> Chosen:
    """Return what would be chosen in stages, with the time of that, if it is sooner than ``soonest``, else that.

    Args:
        soonest: the soonest so far.
        weighed: the candidate.
        best: the best without stages, on which too little may be gained.
        own: whole experts' assignments are executed where their tokens are.
        counts: int64 ``[world_size, num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        costs: the machine's.
    """
    number, saved_s = weighed.num_stages, 0.0
    chosen, loads = weighed.chosen, weighed.loads
    if own:
        # They have a stage of their own, need not be ordered, and the exchange can hide behind them.
        number += 1
        saved_s = 2 * (costs.copy_token_s * (loads.executed - loads.received).max() + weighed.exchange_s)
    limit_s = min(soonest.predicted_s, (1 - LEAST_STAGED_GAIN) * best.chosen.predicted_s) - trial_s(counts, costs)
    # What stages cost is not known where the latency of an exchange is not.
    if number < 2 or costs.exchange_latency_s == 0 or weighed.staged_s - saved_s >= limit_s:
        return soonest
    stages, predicted_s = soonest_stages(
        number, counts, chosen.shares, resident, loads, weighed.sources, weighed.exchange_s, chosen.predicted_s, costs
    )
    if predicted_s >= soonest.predicted_s:
        return soonest
    return Chosen(
        chosen.shares, chosen.from_peer, chosen.senders, False, stages, predicted_s, chosen.at_home, chosen.node_ranks
    )


@compiled
def _many_stay(loads: Loads) -> bool:
    """Return whether so many assignments are executed where their tokens are that whole experts are among them.

    Of experts in one place as many stay as there are ranks to one; here, a quarter of the others do as well.
    """
    world_size, stay = len(loads.executed), (loads.executed - loads.received).sum()
    return bool(4 * world_size * stay > (world_size + 3) * loads.executed.sum())


@compiled
def _candidates(
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
    uneven_s = latest_s - total_s / world_size
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
def _hottest(totals: IntArray, number: int) -> IntArray:
    """Return int64 ``[number]``, the experts with most assignments (``[num_experts]``), hottest first."""
    left, hottest = totals.copy(), np.empty(number, dtype=np.int64)
    for i in range(number):
        hottest[i] = left.argmax()
        left[hottest[i]] = -1
    return hottest


@compiled
def _numbers_spread(
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
        saved_s += (rows * row_s - launches * (costs.launch_s + costs.weights_s)) / world_size
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
