"""Plans a batch by predicted time: who executes how much of which expert, so that the slowest rank is fastest."""

from __future__ import annotations

import numpy as np

from harmoeny.cells import executed_by
from harmoeny.compiled import compiled, inlined
from harmoeny.cost import Links
from harmoeny.held import Slots, shares_at_home
from harmoeny.level_nodes import MOST_AT_ONCE, level_any
from harmoeny.placement import BoolArray, IntArray
from harmoeny.plan import home_tokens, tokens_of_shares
from harmoeny.predict import SLICES, Costs, FloatArray, Sources, costs_of, loads_of_shares, no_senders, no_sources
from harmoeny.sources import choose_sources
from harmoeny.stage_times import soonest_stages, trial_s
from harmoeny.weighed import LEAST_GAIN, Chosen, Held, Weighed, times_of, weigh, where_held
from harmoeny.wire import exchange_s, nodes
from harmoeny.worth import hottest_of, many_stay, numbers_spread, worth_trying

#: What stages have to gain on one exchange of everything, as a share of its time: they move nothing, and what they take
#: is predicted more exactly than what moves gain.
LEAST_STAGED_GAIN = 0.01
#: What halves have to gain on whole fetches, and on none, as a share of that time: making more plans takes time, too.
LEAST_HALVED_GAIN = 0.05


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
        Few arrays, as handing over each takes a third of a microsecond: tokens, int64
        ``[world_size, num_experts, world_size]``; fetches, those that other ranks send, and, if there are any, those of
        which they send half, bool ``[2 or 3, num_experts, world_size]``; what there is of the stages' ``begins`` and
        ``cuts`` and of the senders, one behind the other, int64 ``[num_rows, world_size]``. Then the number of stages,
        0 if there are none, and of :class:`Chosen` ``overlapped`` and ``predicted_s``.
    """
    world_size, num_experts = counts.shape
    machine = costs_of(costs)
    held = where_held(counts, home, resident, room, machine)
    if held.single:
        stays, overlapped, predicted_s = _stays_at_home(held, counts, machine, overlap, staged, spread)
        if stays:
            nothing = np.zeros((2, num_experts, world_size), dtype=np.bool_)
            return home_tokens(counts, home), nothing, no_senders(), 0, overlapped, predicted_s
    links = Links(on_way, seconds)
    chosen = _choose_from(held, counts, home, resident, machine, links, overlap, staged, spread)
    fetches = np.zeros((3 if chosen.halved.size > 0 else 2, num_experts, world_size), dtype=np.bool_)
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
    if len(fetches) > 2:
        fetches[2] = chosen.halved
    return tokens_of_shares(counts, executed, int(machine.node_ranks)), fetches, *rest


@compiled
def _stays_at_home(
    held: Held, counts: IntArray, costs: Costs, overlap: bool, staged: bool, spread: bool
) -> tuple[bool, bool, float]:
    """Return whether nothing can be gained on executing everything at home, the only place where it is held.

    That is what :func:`choose_shares` finds out, too, in more time; arguments as there.

    Returns:
        Also ``overlapped`` and ``predicted_s`` of :class:`Chosen` of that.
    """
    nothing = no_sources(*counts.shape)
    overlapped, predicted_s, num_stages, staged_s = times_of(held.loads, nothing, held.exchange_s, costs, overlap)
    evens, most_spread = worth_trying(held.totals, held.loads, True, held.slots.free, predicted_s, costs)
    limit_s = (1 - LEAST_STAGED_GAIN) * predicted_s
    in_stages = staged and _worth_staging(num_stages, staged_s, limit_s, counts, costs)
    return evens == 0 and (most_spread == 0 or not spread) and not in_stages, overlapped, predicted_s


@inlined
def _worth_staging(num_stages: int, staged_s: float, limit_s: float, counts: IntArray, costs: Costs) -> bool:
    """Return whether a candidate in so many stages may be through before ``limit_s``, with what trying it takes.

    What stages cost is not known where the latency of an exchange is not.
    """
    return num_stages >= 2 and costs.exchange_latency_s > 0 and staged_s < limit_s - trial_s(counts, costs)


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
    held = where_held(counts, home, resident, room, costs)
    return _choose_from(held, counts, home, resident, costs, links, overlap, staged, spread)


@compiled
def _choose_from(
    held: Held,
    counts: IntArray,
    home: IntArray,
    resident: BoolArray,
    costs: Costs,
    links: Links,
    overlap: bool,
    staged: bool,
    spread: bool,
) -> Chosen:
    """Choose as :func:`choose_shares` does, whose arguments these are, with what is held where already known."""
    slots, totals, single = held.slots, held.totals, held.single
    shares = shares_at_home(totals, home, len(counts)) if single else held.shares
    first = weigh(shares, held.loads, no_sources(*counts.shape), held.exchange_s, costs, overlap, single)
    best = soonest = first.chosen
    evens, most_spread = worth_trying(totals, first.loads, single, slots.free, first.chosen.predicted_s, costs)
    # Where ranks are many, and even, nodes hold what their ranks want: another candidate takes longer than it gains.
    if not spread or (evens == 0 and len(counts) > MOST_AT_ONCE):
        most_spread = 0
    numbers = np.empty(0, dtype=np.int64)
    hottest = hottest_of(totals, most_spread)
    if evens > 0 or most_spread > 0:
        numbers = numbers_spread(hottest, counts, first.chosen.shares, home, resident, slots, costs)
        numbers = numbers if evens else numbers[:-1]
    for number in numbers:
        shares = _evened_out(first.chosen.shares, hottest[:number], counts, resident, slots, costs)
        loads = loads_of_shares(counts, shares, costs)
        one_way_s = exchange_s(counts, shares, loads, costs)
        if number != numbers[0]:
            _, at_best_s, _, staged_s = times_of(loads, first.sources, one_way_s, costs, overlap)
            limit_s = min(best.predicted_s, soonest.predicted_s / (1 - LEAST_STAGED_GAIN))
            if at_best_s >= limit_s and staged_s >= soonest.predicted_s:
                continue  # even if nothing had to be fetched for it
        sources = choose_sources(counts, shares, home, resident, slots, costs, links, False)
        weighed = weigh(shares, loads, sources, one_way_s, costs, overlap, False)
        if _worth_halving(shares, resident, sources, one_way_s, weighed.chosen.predicted_s, costs):
            sources = choose_sources(counts, shares, home, resident, slots, costs, links, True)
            halved = weigh(shares, loads, sources, one_way_s, costs, overlap, False)
            whole_s = min(weighed.chosen.predicted_s, first.chosen.predicted_s)
            if halved.chosen.predicted_s < (1 - LEAST_HALVED_GAIN) * whole_s:
                weighed = halved
        if weighed.chosen.predicted_s < best.predicted_s:
            best = weighed.chosen
        if staged:
            own = bool(number > 0) or (not single and many_stay(loads))
            soonest = _sooner(soonest, weighed, best.predicted_s, own, counts, resident, costs)
    if staged:
        own = not single and many_stay(first.loads)
        soonest = _sooner(soonest, first, best.predicted_s, own, counts, resident, costs)
    if best.predicted_s >= (1 - LEAST_GAIN) * first.chosen.predicted_s:
        best = first.chosen
    return soonest if soonest.predicted_s < (1 - LEAST_STAGED_GAIN) * best.predicted_s else best


@compiled
def _worth_halving(
    shares: IntArray, resident: BoolArray, sources: Sources, one_way_s: float, predicted_s: float, costs: Costs
) -> bool:
    """Return whether a layer may be that much faster where both sources bring half of what it waits for.

    Args:
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes.
        resident: bool ``[num_experts, world_size]``.
        sources: of whole fetches.
        one_way_s: what the exchange takes one way.
        predicted_s: what the layer takes with them.
        costs: the machine's.
    """
    if costs.halves == 0 or costs.peer_fetch_s <= 0:
        return False
    world_size, num_experts = shares.shape
    latest, gain_s = sources.ready_s.argmax(), LEAST_HALVED_GAIN * predicted_s
    ready_s, peer_s = sources.ready_s[latest], costs.peer_fetch_s - costs.exchange_latency_s
    # With both sources busy until the last of its experts is there.
    both_s = sources.fetched[SLICES, latest] * costs.fetch_s * peer_s / (costs.fetch_s + peer_s)
    if ready_s - max(max(one_way_s, both_s), max(ready_s, costs.fetch_s) / 2) <= gain_s:
        return False
    node, halves = nodes(world_size, costs), np.zeros(world_size, dtype=np.bool_)
    for expert in range(num_experts):
        last = -1
        for rank in range(world_size - 1, -1, -1):
            if shares[rank, expert] > 0 and not resident[expert, rank]:
                if last < 0 or node[last] != node[rank]:
                    halves[rank] = True  # nobody behind it on its node wants the expert
                last = rank
    late = 0
    for rank in range(world_size):
        late += not halves[rank] and sources.ready_s[rank] > ready_s - gain_s
    return late == 0


@compiled
def _evened_out(
    held: IntArray, spread: IntArray, counts: IntArray, resident: BoolArray, slots: Slots, costs: Costs
) -> IntArray:
    """Return int64 ``[world_size, num_experts]``, shares that are evened out after experts were brought to all ranks.

    Args:
        held: int64 ``[world_size, num_experts]``, shares without either.
        spread: int64, these experts.
        counts: int64 ``[world_size, num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks.
        costs: the machine's.
    """
    shares = held.copy()
    for expert in spread:
        for rank in range(len(shares)):
            shares[rank, expert] = counts[rank, expert]
    level_any(shares, counts, resident, slots, costs)
    return shares


@inlined
def _sooner(
    soonest: Chosen,
    weighed: Weighed,
    best_s: float,
    own: bool,
    counts: IntArray,
    resident: BoolArray,
    costs: Costs,
) -> Chosen:
    """Return what would be chosen in stages, with the time of that, if it is sooner than ``soonest``, else that.

    Args:
        soonest: the soonest so far.
        weighed: the candidate.
        best_s: the time of the best without stages, on which too little may be gained.
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
    limit_s = min(soonest.predicted_s, (1 - LEAST_STAGED_GAIN) * best_s)
    if not _worth_staging(number, weighed.staged_s - saved_s, limit_s, counts, costs):
        return soonest
    stages, predicted_s = soonest_stages(
        number, counts, chosen.shares, resident, loads, weighed.sources, weighed.exchange_s, chosen.predicted_s, costs
    )
    if predicted_s >= soonest.predicted_s:
        return soonest
    return Chosen(
        chosen.shares,
        chosen.from_peer,
        chosen.senders,
        chosen.halved,
        False,
        stages,
        predicted_s,
        chosen.at_home,
        chosen.node_ranks,
    )
