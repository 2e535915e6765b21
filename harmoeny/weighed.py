"""Candidates of a plan, and what they are predicted to take."""

from __future__ import annotations

from typing import NamedTuple

from harmoeny.cells import totals_of
from harmoeny.compiled import compiled
from harmoeny.held import Slots, shares_at_home, shares_where_held
from harmoeny.lines import Stages, no_stages
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs, Loads, Sources, layer_s, loads_at_home, loads_of_shares, no_sources
from harmoeny.stage_number import best_stages
from harmoeny.wire import exchange_at_home_s, exchange_s

#: What a plan has to gain on executing everything where it is held, as a share of that time; less is noise.
LEAST_GAIN = 0.02


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


class Weighed(NamedTuple):
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
def weigh(
    shares: IntArray, loads: Loads, sources: Sources, one_way_s: float, costs: Costs, overlap: bool, at_home: bool
) -> Weighed:
    """Return shares with their time; ``one_way_s``: what their exchange takes."""
    overlapped, predicted_s, num_stages, staged_s = times_of(loads, sources, one_way_s, costs, overlap)
    chosen = Chosen(
        shares, sources.from_peer, sources.senders, overlapped, no_stages(), predicted_s, at_home, int(costs.node_ranks)
    )
    return Weighed(chosen, loads, sources, one_way_s, num_stages, staged_s)


@compiled
def times_of(
    loads: Loads, sources: Sources, one_way_s: float, costs: Costs, overlap: bool
) -> tuple[bool, float, int, float]:
    """Return ``overlapped`` and ``predicted_s`` of :class:`Chosen`, and ``num_stages`` and ``staged_s`` of a candidate.

    Args:
        loads: what the ranks do.
        sources: what they fetch.
        one_way_s: what the exchange takes one way.
        costs: the machine's.
        overlap: a rank's own rows may be executed while the others are on their way.
    """
    plain_s, overlapped_s = layer_s(loads, sources, one_way_s, costs)
    overlapped = overlap and overlapped_s < (1 - LEAST_GAIN) * plain_s
    num_stages, gain_s = best_stages(loads, one_way_s, costs)
    return overlapped, overlapped_s if overlapped else plain_s, num_stages, plain_s - gain_s


@compiled
def where_held(
    counts: IntArray, home: IntArray, resident: BoolArray, slots: Slots, costs: Costs, overlap: bool
) -> tuple[Weighed, IntArray, bool]:
    """Return the candidate that executes everything where it is held, and so fetches nothing.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        slots: of the ranks.
        costs: the machine's.
        overlap: a rank's own rows may be executed while the others are on their way.

    Returns:
        It; int64 ``[num_experts]``, assignments of every expert; and whether every expert is held once.
    """
    world_size, num_experts = counts.shape
    single, totals = (slots.number - slots.free).sum() == num_experts, totals_of(counts)
    if single:
        held, loads = shares_at_home(totals, home, world_size), loads_at_home(counts, totals, home, costs)
        one_way_s = exchange_at_home_s(counts, home, loads, costs)
    else:
        held = shares_where_held(counts, home, resident, costs)
        loads = loads_of_shares(counts, held, costs)
        one_way_s = exchange_s(counts, held, loads, costs)
    return weigh(held, loads, no_sources(world_size, num_experts), one_way_s, costs, overlap, single), totals, single
