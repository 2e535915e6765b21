"""Candidates of a plan, and what they are predicted to take."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harmoeny.cells import totals_of
from harmoeny.compiled import compiled
from harmoeny.held import Slots, shares_where_held, slots_in
from harmoeny.lines import Stages
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs, Loads, Sources, layer_s, loads_at_home, loads_of_shares
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
        halved: bool ``[num_experts, world_size]``, of which only half, and the rest the host; of no size: none.
        overlapped: whether a rank's own rows are executed while the others are on their way.
        stages: as of a plan; of no size: there is one.
        predicted_s: seconds from the plan to the end of the combine.
        at_home: whether everything is executed on its home rank because nobody else holds it.
        node_ranks: ranks of a node, whose rows stay on it where they can; 0: nodes do not matter.
    """

    shares: IntArray
    from_peer: BoolArray
    senders: IntArray
    halved: BoolArray
    overlapped: bool
    stages: Stages
    predicted_s: float
    at_home: bool
    node_ranks: int


class Held(NamedTuple):
    """Everything executed where it is held.

    Attributes:
        shares: int64 ``[world_size, num_experts]``, assignments that every rank executes, its own first; of no size
            where all are executed at home.
        loads: what the ranks do.
        exchange_s: what the exchange takes one way.
        slots: of the ranks.
        totals: int64 ``[num_experts]``, assignments of every expert.
        single: whether every expert is held once, so at home.
    """

    shares: IntArray
    loads: Loads
    exchange_s: float
    slots: Slots
    totals: IntArray
    single: bool


class Times(NamedTuple):
    """What a candidate takes.

    Attributes:
        overlapped: whether a rank's own rows are executed while the others are on their way.
        predicted_s: seconds from the plan to the end of the combine, without stages.
        num_stages: how many stages may pay; 1: none.
        staged_s: what it takes in these, if products and exchange overlap as well as they can.
    """

    overlapped: bool
    predicted_s: float
    num_stages: int
    staged_s: float


@compiled
def chosen_of(
    shares: IntArray,
    sources: Sources,
    stages: Stages,
    overlapped: bool,
    predicted_s: float,
    at_home: bool,
    costs: Costs,
) -> Chosen:
    """Return shares as what was chosen; ``sources``: of what they fetch, the others as of :class:`Chosen`."""
    return Chosen(
        shares,
        sources.from_peer,
        sources.senders,
        sources.halved,
        overlapped,
        stages,
        predicted_s,
        at_home,
        int(costs.node_ranks),
    )


@compiled
def times_of(loads: Loads, sources: Sources, one_way_s: float, costs: Costs, overlap: bool) -> Times:
    """Return what a candidate takes.

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
    return Times(overlapped, overlapped_s if overlapped else plain_s, num_stages, plain_s - gain_s)


@compiled
def where_held(counts: IntArray, home: IntArray, resident: BoolArray, room: int, costs: Costs) -> Held:
    """Return what ranks do where everything is executed where it is held, so that nothing is fetched.

    Args:
        counts: int64 ``[world_size, num_experts]``, assignments per source rank and expert.
        home: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``.
        room: slots of a rank, never fewer than the experts whose home it is; 0: those.
        costs: the machine's.
    """
    num_experts = len(home)
    slots = slots_in(room, home, resident)
    single, totals = (slots.number - slots.free).sum() == num_experts, totals_of(counts)
    if single:
        loads = loads_at_home(counts, totals, home, costs)
        one_way_s = exchange_at_home_s(counts, home, loads, costs)
        return Held(np.empty((0, 0), dtype=np.int64), loads, one_way_s, slots, totals, single)
    held = shares_where_held(counts, home, resident, costs)
    loads = loads_of_shares(counts, held, costs)
    return Held(held, loads, exchange_s(counts, held, loads, costs), slots, totals, single)
