"""Plans a batch by predicted time: who executes how much of which expert, so that the slowest rank is fastest."""

from __future__ import annotations

import numpy as np

from harmoeny.cells import executed_by, largest_at
from harmoeny.compiled import borrowing, compiled, inlined
from harmoeny.cost import Links
from harmoeny.held import Slots, shares_at_home
from harmoeny.level_nodes import MOST_AT_ONCE, level_any
from harmoeny.lines import no_stages
from harmoeny.placement import BoolArray, FloatArray, IntArray
from harmoeny.plan import home_tokens, tokens_of_shares
from harmoeny.predict import SLICES, Costs, Loads, Sources, costs_of, loads_of_shares, no_senders, no_sources
from harmoeny.sources import choose_sources
from harmoeny.stage_times import soonest_stages, trial_s
from harmoeny.weighed import LEAST_GAIN, Chosen, Held, Times, chosen_of, times_of, where_held
from harmoeny.wire import exchange_s, nodes
from harmoeny.worth import many_stay, numbers_spread, worth_trying

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
                fetches[2, expert, rank] = chosen.halved[expert, rank]
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
    times = times_of(held.loads, nothing, held.exchange_s, costs, overlap)
    evens, most_spread = worth_trying(held.totals, held.loads, True, held.slots.free, times.predicted_s, costs)
    limit_s = (1 - LEAST_STAGED_GAIN) * times.predicted_s
    in_stages = staged and _worth_staging(times.num_stages, times.staged_s, limit_s, counts, costs)
    return evens == 0 and (most_spread == 0 or not spread) and not in_stages, times.overlapped, times.predicted_s


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

    :func:`plan_by_time` does the same for every batch. This one is not compiled, so that the machine code of all that
    it calls, most of the planner's, is made and loaded once; handing over what is held takes microseconds.

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
    at_first = shares_at_home(totals, home, len(counts)) if single else held.shares
    nothing = no_sources(*counts.shape)
    first_times = times_of(held.loads, nothing, held.exchange_s, costs, overlap)
    first = chosen_of(at_first, nothing, no_stages(), first_times.overlapped, first_times.predicted_s, single, costs)
    best = soonest = first
    evens, most_spread = worth_trying(totals, held.loads, single, slots.free, first.predicted_s, costs)
    # Where ranks are many, and even, nodes hold what their ranks want: another candidate takes longer than it gains.
    if not spread or (evens == 0 and len(counts) > MOST_AT_ONCE):
        most_spread = 0
    hottest, numbers = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    if evens > 0 or most_spread > 0:
        hottest, numbers = numbers_spread(totals, most_spread, counts, at_first, home, resident, slots, costs)
        numbers = numbers if evens else numbers[:-1]
    for number in numbers:
        shares = _evened_out(at_first, hottest[:number], counts, resident, slots, costs)
        loads = loads_of_shares(counts, shares, costs)
        one_way_s = exchange_s(counts, shares, loads, costs)
        if number != numbers[0]:
            at_best = times_of(loads, nothing, one_way_s, costs, overlap)
            limit_s = min(best.predicted_s, soonest.predicted_s / (1 - LEAST_STAGED_GAIN))
            if at_best.predicted_s >= limit_s and at_best.staged_s >= soonest.predicted_s:
                continue  # even if nothing had to be fetched for it
        sources = choose_sources(counts, shares, home, resident, slots, costs, links, False)
        times = times_of(loads, sources, one_way_s, costs, overlap)
        if _halves_may_pay(sources, one_way_s, times.predicted_s, costs) and _all_halve(
            shares, resident, sources.ready_s, times.predicted_s, costs
        ):
            halved = choose_sources(counts, shares, home, resident, slots, costs, links, True)
            halved_times = times_of(loads, halved, one_way_s, costs, overlap)
            if halved_times.predicted_s < (1 - LEAST_HALVED_GAIN) * min(times.predicted_s, first.predicted_s):
                sources, times = halved, halved_times
        if times.predicted_s < best.predicted_s:
            best = chosen_of(shares, sources, no_stages(), times.overlapped, times.predicted_s, False, costs)
        if staged:
            own = bool(number > 0) or (not single and many_stay(loads))
            limit_s = min(soonest.predicted_s, (1 - LEAST_STAGED_GAIN) * best.predicted_s)
            num_stages = _stages_tried(times, loads, one_way_s, own, limit_s, counts, costs)
            if num_stages > 0:
                soonest = _sooner(
                    soonest, num_stages, times, shares, loads, sources, one_way_s, False, counts, resident, costs
                )
    if staged:
        own = not single and many_stay(held.loads)
        limit_s = min(soonest.predicted_s, (1 - LEAST_STAGED_GAIN) * best.predicted_s)
        num_stages = _stages_tried(first_times, held.loads, held.exchange_s, own, limit_s, counts, costs)
        if num_stages > 0:
            soonest = _sooner(
                soonest, num_stages, first_times, at_first, held.loads, nothing, held.exchange_s, single, counts,
                resident, costs,
            )  # fmt: skip
    if best.predicted_s >= (1 - LEAST_GAIN) * first.predicted_s:
        best = first
    return soonest if soonest.predicted_s < (1 - LEAST_STAGED_GAIN) * best.predicted_s else best


@borrowing
def _halves_may_pay(sources: Sources, one_way_s: float, predicted_s: float, costs: Costs) -> bool:
    """Return whether a layer may be that much faster where both sources bring half of what its latest rank waits for.

    Args:
        sources: of whole fetches.
        one_way_s: what the exchange takes one way.
        predicted_s: what the layer takes with them.
        costs: the machine's.
    """
    if costs.halves == 0 or costs.peer_fetch_s <= 0:
        return False
    latest = largest_at(sources.ready_s)
    ready_s, peer_s = sources.ready_s[latest], costs.peer_fetch_s - costs.exchange_latency_s
    # With both sources busy until the last of its experts is there.
    both_s = sources.fetched[SLICES, latest] * costs.fetch_s * peer_s / (costs.fetch_s + peer_s)
    soonest_s = max(max(one_way_s, both_s), max(ready_s, costs.fetch_s) / 2)
    return bool(ready_s - soonest_s > LEAST_HALVED_GAIN * predicted_s)


@compiled
def _all_halve(shares: IntArray, resident: BoolArray, ready_s: FloatArray, predicted_s: float, costs: Costs) -> bool:
    """Return whether all ranks that would be late have a fetch that may be halved.

    Args:
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes.
        resident: bool ``[num_experts, world_size]``.
        ready_s: float64 ``[world_size]``, when their whole fetches are there.
        predicted_s: what the layer takes with them.
        costs: the machine's.
    """
    world_size, num_experts = shares.shape
    node, halves = nodes(world_size, costs), np.zeros(world_size, dtype=np.bool_)
    for expert in range(num_experts):
        last = -1
        for rank in range(world_size - 1, -1, -1):
            if shares[rank, expert] > 0 and not resident[expert, rank]:
                if last < 0 or node[last] != node[rank]:
                    halves[rank] = True  # nobody behind it on its node wants the expert
                last = rank
    in_time_s = ready_s.max() - LEAST_HALVED_GAIN * predicted_s
    return bool((halves | (ready_s <= in_time_s)).all())


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


@borrowing
def _stages_tried(
    times: Times, loads: Loads, one_way_s: float, own: bool, limit_s: float, counts: IntArray, costs: Costs
) -> int:
    """Return how many stages a candidate is tried in, 0 if it cannot be through in time.

    Args:
        times: what it takes.
        loads: what the ranks do.
        one_way_s: what its exchange takes one way.
        own: whole experts' assignments are executed where their tokens are.
        limit_s: when it has to be through, with what trying it takes.
        counts: int64 ``[world_size, num_experts]``.
        costs: the machine's.
    """
    number, saved_s = times.num_stages, 0.0
    if own:
        # They have a stage of their own, need not be ordered, and the exchange can hide behind them.
        number += 1
        stay = 0
        for rank in range(len(counts)):
            stay = max(stay, loads.executed[rank] - loads.received[rank])
        saved_s = 2 * (costs.copy_token_s * stay + one_way_s)
    return number if _worth_staging(number, times.staged_s - saved_s, limit_s, counts, costs) else 0


@inlined
def _sooner(
    soonest: Chosen,
    num_stages: int,
    times: Times,
    shares: IntArray,
    loads: Loads,
    sources: Sources,
    one_way_s: float,
    at_home: bool,
    counts: IntArray,
    resident: BoolArray,
    costs: Costs,
) -> Chosen:
    """Return what would be chosen in stages, with the time of that, if it is sooner than ``soonest``, else that.

    Args:
        soonest: the soonest so far.
        num_stages: how many seem enough.
        times: what the candidate takes without.
        shares: int64 ``[world_size, num_experts]``, its own.
        loads: what the ranks do.
        sources: what they fetch.
        one_way_s: what its exchange takes one way.
        at_home: as of :class:`Chosen`.
        counts: int64 ``[world_size, num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        costs: the machine's.
    """
    stages, stages_s = soonest_stages(
        num_stages, counts, shares, resident, loads, sources, one_way_s, times.predicted_s, costs
    )
    if stages_s >= soonest.predicted_s:
        return soonest
    return chosen_of(shares, sources, stages, False, stages_s, at_home, costs)
