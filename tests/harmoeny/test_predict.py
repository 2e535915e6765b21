"""The cost model of plans against sums made by hand, and its shortcut against its general form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.cost import NO_LINKS
from harmoeny.held import with_free
from harmoeny.placement import IntArray, Placement, place
from harmoeny.predict import (
    ALONE_S,
    SLICES,
    TOKENS_S,
    Costs,
    Loads,
    Sources,
    add_slice,
    layer_s,
    loads_at_home,
    loads_of_shares,
    no_halves,
    no_loads,
    no_senders,
    no_sources,
    rows_s,
    shared_s,
    work_s,
)
from harmoeny.sources import choose_sources
from tests.strategies import batches, examples

Batch = tuple[IntArray, Placement]
#: Costs in round numbers: seconds become whole.
COSTS = Costs(
    token_s=1.0, launch_s=3.0, weights_s=2.0, exchange_token_s=10.0, fetch_s=100.0, peer_fetch_s=31.0,
    exchange_latency_s=1.0, copy_token_s=0.5, tile_tokens=1.0, grouped=0.0,
    node_ranks=0.0, inside_share=1.0, network_share=1.0, pair_share=1.0, relays=0.0,
)  # fmt: skip


def seconds_of(slices: list[int], costs: Costs) -> float:
    """Return how long one rank computes these slices."""
    loads = no_loads(1)
    for num_tokens in slices:
        add_slice(loads.work, 0, num_tokens, 1, costs)
    return float(work_s(loads.work, 0, costs))


def test_a_slice_takes_its_launch_and_its_tokens_or_its_weights() -> None:
    assert [seconds_of([n], COSTS) for n in (0, 1, 2, 5)] == [0.0, 5.0, 5.0, 8.0]
    assert seconds_of([1, 2, 5], COSTS) == 18.0
    assert seconds_of([1, 5], COSTS._replace(tile_tokens=4)) == (3 + 4) + (3 + 8)


def test_grouped_slices_are_launched_once_and_share_memory_and_products() -> None:
    grouped = COSTS._replace(grouped=1.0)
    assert seconds_of([1, 1, 1], grouped) == 3 + 3 * 2.0, "bound by the weights that are read"
    assert seconds_of([1, 1, 9], grouped) == 3 + 11.0, "bound by the products"
    assert seconds_of([0, 0], grouped) == 0.0


@examples(100)
@given(batches(max_world_size=6, max_experts=12, max_tokens=30))
def test_at_home_is_the_general_case_with_all_shares_at_home(batch: Batch) -> None:
    counts, placement = batch
    shares = np.zeros_like(counts)
    shares[placement.home, np.arange(placement.num_experts)] = counts.sum(axis=0)
    found = loads_at_home(counts, counts.sum(axis=0), placement.home, COSTS)
    wanted = loads_of_shares(counts, shares, COSTS)
    np.testing.assert_array_equal(found[:4], wanted[:4])
    np.testing.assert_allclose(found[4:], wanted[4:])


def test_loads_of_a_batch_that_is_split() -> None:
    counts = np.array([[6, 4], [8, 0]])  # of the ranks' own tokens
    shares = np.array([[10, 0], [4, 4]])  # rank 0 executes 10 of expert 0, rank 1 the rest of it and expert 1
    loads: Loads = loads_of_shares(counts, shares, COSTS)
    assert loads.routed.tolist() == [10, 8]
    assert loads.sent.tolist() == [4, 4]
    assert loads.received.tolist() == [4, 4]
    assert loads.executed.tolist() == [10, 8]
    assert loads.work[ALONE_S].tolist() == [13.0, 7.0 + 7.0]
    assert loads.own[ALONE_S].tolist() == [9.0, 7.0]
    assert loads.others[ALONE_S].tolist() == [7.0, 7.0]


def layer_by_hand(loads: Loads, sources: Sources, *, overlap: bool) -> float:
    """Walk every rank through its phases, slice after slice."""
    exchange_s = 1.0 + 10.0 * max(*loads.sent, *loads.received)
    gather_s = 0.5 * max(loads.routed)
    ends = []
    for rank in range(len(loads.sent)):
        group_s = 0.5 * loads.executed[rank] if loads.work[SLICES, rank] > 1 else 0.0
        arrived_s, fetched_s = gather_s + exchange_s + group_s, sources.fetched[ALONE_S, rank]
        if overlap:
            fetched_s = sources.fetched_own[ALONE_S, rank] + sources.fetched_others[ALONE_S, rank]
            own_end_s = gather_s + loads.own[ALONE_S, rank] - sources.fetched_own[ALONE_S, rank]
            others_s = loads.others[ALONE_S, rank] - sources.fetched_others[ALONE_S, rank]
            held_end_s = max(own_end_s, arrived_s) + others_s
        else:
            held_end_s = arrived_s + loads.work[ALONE_S, rank] - fetched_s
        ends.append(max(held_end_s, sources.ready_s[rank]) + fetched_s + group_s)
    return float(max(max(ends) + exchange_s + 2 * gather_s, *sources.host_link_s))


def sources_of(ready_s: list[float], link_s: list[float], slices: dict[int, list[int]], *, joins: bool) -> Sources:
    """Return sources of ranks whose fetched experts have so many own rows each, and no others."""
    world_size, fetched = len(ready_s), np.zeros((3, len(ready_s)))
    for rank, of_rank in slices.items():
        for num_tokens in of_rank:
            add_slice(fetched, rank, num_tokens, 1, COSTS)
    turns = np.array([int(rank in slices) for rank in range(world_size)])
    none = np.zeros((3, world_size))
    from_peer = np.zeros((2, world_size), dtype=np.bool_)
    held, waiting = np.full(world_size, joins), np.zeros(world_size)
    busy = np.array(ready_s), np.array(link_s)
    return Sources(from_peer, no_senders(), no_halves(), *busy, fetched, fetched, none, held, turns, waiting, none)


@pytest.mark.parametrize(
    ("ready_s", "link_s"), [([0.0, 0.0], [0.0, 0.0]), ([0.0, 300.0], [0.0, 0.0]), ([0.0, 0.0], [0.0, 999.0])]
)
def test_a_layer_is_its_slowest_rank_through_all_phases(ready_s: list[float], link_s: list[float]) -> None:
    loads = loads_of_shares(np.array([[6, 4], [8, 4]]), np.array([[14, 0], [0, 8]]), COSTS)
    sources = sources_of(ready_s, link_s, {1: [4]}, joins=False)
    plain_s, overlapped_s = layer_s(loads, sources, rows_s(loads, COSTS), COSTS)
    assert plain_s == layer_by_hand(loads, sources, overlap=False)
    assert overlapped_s == layer_by_hand(loads, sources, overlap=True)


def test_copies_delay_what_their_rank_computes_where_its_processor_makes_them() -> None:
    loads = loads_of_shares(np.array([[6, 4], [8, 4]]), np.array([[14, 0], [0, 8]]), COSTS)
    sources = sources_of([0.0, 20.0], [0.0, 40.0], {1: [4]}, joins=False)  # a fetch and a restore, of 20 each
    free_s = layer_s(loads, sources, rows_s(loads, COSTS), COSTS)
    taken_s = layer_s(loads, sources, rows_s(loads, COSTS), COSTS._replace(copy_share=0.5))
    # Of slices, the other rank is the slower one without copies; not where a launch more is made for own rows.
    slowest_s, other_s = 3 + 8.0, 3 + 14.0
    assert np.subtract(taken_s, free_s).tolist() == [slowest_s + 20 - other_s, 20]


@pytest.mark.parametrize(("speedup", "busy_s"), [(1.0, 33.0), (1.5, 5 + 28 / 1.5), (2.0, 5 + 28 / 2)])
def test_a_rank_that_shares_what_computes_is_faster_once_the_other_is_through(speedup: float, busy_s: float) -> None:
    loads = loads_of_shares(np.array([[15, 1], [15, 1]]), np.array([[30, 0], [0, 2]]), COSTS)
    costs = COSTS._replace(idle_speedup=speedup)
    plain_s, _ = layer_s(loads, no_sources(2, 2), rows_s(loads, costs), costs)
    assert plain_s == pytest.approx(busy_s + 2 * rows_s(loads, costs) + 3 * 0.5 * 16)


@pytest.mark.parametrize(
    ("speedup", "through_s"), [(1.0, [10, 20, 40]), (1.5, [10, 50 / 3, 30]), (9.0, [10, 50 / 3, 70 / 3])]
)
def test_ranks_share_what_computes_in_equal_parts(speedup: float, through_s: list[float]) -> None:
    """Three ranks of three cores, of two, and of as many as each can use; all work takes as long as it does on all."""
    busy_s, costs = np.array([20.0, 40.0, 10.0]), COSTS._replace(idle_speedup=speedup)
    assert sorted(shared_s(busy_s, own_s, costs) for own_s in busy_s) == pytest.approx(through_s)


def test_grouped_fetched_experts_share_a_launch_and_that_of_the_others_where_they_have_slots() -> None:
    costs = COSTS._replace(grouped=1.0)
    loads = loads_of_shares(np.array([[6, 4, 5]]), np.array([[6, 4, 5]]), costs)

    def seconds(ready_s: float, *, joins: bool) -> float:
        sources = sources_of([ready_s], [0.0], {0: [4, 5]}, joins=joins)
        return layer_s(loads, sources, rows_s(loads, costs), costs)[0]

    together_s, _ = layer_s(loads, no_sources(1, 3), rows_s(loads, costs), costs)
    # Rows are there at 0.5 * 15 * 2 + 1 = 16 s, and the resident is executed at 25 s.
    assert seconds(0.0, joins=False) == together_s + costs.launch_s
    assert seconds(0.0, joins=True) == together_s
    assert seconds(16.0 + 1.0, joins=True) == together_s + 1.0, "waiting for them takes less than a launch"
    assert seconds(16.0 + 5.0, joins=True) == together_s + costs.launch_s
    assert seconds(25.0 + 5.0, joins=True) == together_s + costs.launch_s + 5.0


def test_fetches_that_need_a_residents_slot_begin_when_it_was_executed() -> None:
    loads = loads_of_shares(np.array([[6, 4, 5]]), np.array([[6, 4, 5]]), COSTS)
    sources = sources_of([100.0], [0.0], {0: [4]}, joins=False)
    makes_room = np.zeros((3, 1))
    add_slice(makes_room, 0, 5, 1, COSTS)
    late = sources._replace(waiting=np.array([1.0]), makes_room=makes_room)
    # Gathered in 7.5 s, exchanged in 1, reordered in 7.5; a resident in 3 + 5, a fetch in 100; own rows: 7.5 + 9 + 8.
    (plain_s, overlapped_s), (late_s, late_overlapped_s) = (layer_s(loads, s, 1.0, COSTS) for s in (sources, late))
    assert late_s - plain_s == 7.5 + 1.0 + 7.5 + 8.0
    assert late_overlapped_s - overlapped_s == 7.5 + 9.0 + 8.0 + 8.0


def test_fetches_from_the_host_wait_where_all_slots_hold_what_is_executed() -> None:
    placement = place("contiguous", 4, 2)  # experts 0 and 1 at home on rank 0, 2 and 3 on rank 1
    shares = np.array([[5, 5, 0, 0], [7, 0, 4, 5]])
    alone = COSTS._replace(peer_fetch_s=0.0)

    def waiting(shares: IntArray, free: list[int], costs: Costs) -> list[int]:
        slots = with_free(np.array(free), placement.resident)
        found = choose_sources(shares, shares, placement.home, placement.resident, slots, costs, NO_LINKS, False)
        assert found.makes_room[TOKENS_S].tolist() == [5.0, 4.0], "the one with the fewest assignments"
        return list(found.waiting)

    assert waiting(shares, [0, 0], alone) == [0, 1]
    assert waiting(shares, [0, 1], alone) == [0, 0]
    assert waiting(shares, [0, 0], COSTS) == [0, 0], "what peers send has memory of its own until a slot is free"
    assert waiting(shares - np.array([[0] * 4, [0, 0, 0, 5]]), [0, 0], alone) == [0, 0], "that slot is free"


def test_fetches_come_from_whoever_has_time() -> None:
    placement = place("contiguous", 4, 4)  # expert e at home on rank e
    shares = np.diag([5, 5, 5, 5]).astype(np.int64)
    shares[1:, 0] = 5  # expert 0 is fetched by all other ranks
    idle = np.zeros(4, dtype=np.int64)
    found = choose_sources(
        shares,
        shares,
        placement.home,
        placement.resident,
        with_free(idle + 9, placement.resident),
        COSTS,
        NO_LINKS,
        False,
    )
    # The home sends one after the other: 31, 61, 91 s; the host's link would take 100 s.
    assert found.from_peer[0].tolist() == [False, True, True, True]
    assert found.ready_s.tolist() == [0.0, 91.0, 91.0, 91.0]
    assert found.host_link_s.tolist() == [0.0, 0.0, 0.0, 0.0]
    # With slower peers the third is sooner there from the host.
    slow = COSTS._replace(peer_fetch_s=46.0)
    found = choose_sources(
        shares,
        shares,
        placement.home,
        placement.resident,
        with_free(idle + 9, placement.resident),
        slow,
        NO_LINKS,
        False,
    )
    assert found.from_peer[0].tolist() == [False, True, True, False]
    assert found.ready_s.tolist() == [0.0, 91.0, 91.0, 100.0]
    # Without a free slot every fetch is followed by a restore over the host's link.
    found = choose_sources(
        shares, shares, placement.home, placement.resident, with_free(idle, placement.resident), slow, NO_LINKS, False
    )
    assert found.from_peer[0].tolist() == [False, True, True, True]
    assert found.host_link_s.tolist() == [0.0, 100.0, 100.0, 100.0]


def test_without_peers_everything_comes_from_the_host() -> None:
    placement = place("contiguous", 2, 2)
    shares = np.array([[5, 5], [5, 5]])
    found = choose_sources(
        shares,
        shares,
        placement.home,
        placement.resident,
        with_free(np.array([1, 0]), placement.resident),
        COSTS._replace(peer_fetch_s=0.0),
        NO_LINKS,
        False,
    )
    assert not found.from_peer.any()
    assert found.ready_s.tolist() == [100.0, 100.0]
    assert found.host_link_s.tolist() == [100.0, 200.0]


@examples(60)
@given(batches(max_world_size=5, max_experts=8, max_tokens=30), st.integers(0, 2**32 - 1))
def test_only_what_is_executed_and_not_held_is_fetched(batch: Batch, seed: int) -> None:
    counts, placement = batch
    rng = np.random.default_rng(seed)
    shares = np.ascontiguousarray(rng.integers(0, 3, counts.shape))
    free = rng.integers(0, 3, placement.world_size)
    found = choose_sources(
        counts, shares, placement.home, placement.resident, with_free(free, placement.resident), COSTS, NO_LINKS, False
    )
    fetched = (shares.T > 0) & ~placement.resident
    assert not (found.from_peer & ~fetched).any()
    number = fetched.sum(axis=0)
    from_host = number - found.from_peer.sum(axis=0)
    slots = free + placement.resident.sum(axis=0)
    restores = np.maximum(np.minimum(number, slots) - free, 0)
    np.testing.assert_array_equal(found.host_link_s, 100.0 * (from_host + restores))
    assert (from_host <= slots).all(), "weights from peers have memory of their own"
    np.testing.assert_array_equal(found.turns, np.ceil(number / np.maximum(slots, 1)))
    assert ((found.ready_s > 0) == (number > 0)).all()
