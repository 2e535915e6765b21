"""Shares by predicted time: nothing is lost, nothing gets slower, and small cases are near the best of all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from harmoeny.balance import choose_shares, plan_by_time
from harmoeny.compiled import compiled
from harmoeny.cost import NO_LINKS, Links
from harmoeny.held import Slots, shares_at_home, shares_where_held, slots_in, with_free
from harmoeny.level import level
from harmoeny.level_nodes import _of_node, level_any
from harmoeny.placement import BoolArray, FloatArray, IntArray, Placement, place
from harmoeny.plan import Plan, tokens_of_shares
from harmoeny.predict import Costs, layer_s, loads_at_home, loads_of_shares
from harmoeny.sources import choose_sources
from harmoeny.weighed import LEAST_GAIN
from harmoeny.wire import exchange_at_home_s, exchange_s
from tests.strategies import batches, examples, make_counts, scattered

Batch = tuple[IntArray, Placement]
COSTS = Costs(
    token_s=1.0, launch_s=3.0, weights_s=2.0, exchange_token_s=0.5, fetch_s=20.0, peer_fetch_s=8.0,
    exchange_latency_s=1.0, copy_token_s=0.1, tile_tokens=1.0, grouped=0.0,
    node_ranks=0.0, inside_share=1.0, network_share=1.0, pair_share=1.0, relays=0.0,
)  # fmt: skip
costs_of_machines = st.builds(
    Costs,
    token_s=st.sampled_from([0.01, 1.0]),
    launch_s=st.sampled_from([0.0, 3.0]),
    weights_s=st.sampled_from([0.0, 40.0]),
    exchange_token_s=st.sampled_from([0.0, 0.5, 5.0]),
    fetch_s=st.sampled_from([0.1, 20.0, 1e4]),
    peer_fetch_s=st.sampled_from([0.0, 1.5, 8.0]),
    exchange_latency_s=st.sampled_from([0.0, 1.0]),
    copy_token_s=st.sampled_from([0.0, 0.1]),
    tile_tokens=st.sampled_from([1.0, 16.0]),
    grouped=st.sampled_from([0.0, 1.0]),
    node_ranks=st.sampled_from([0.0, 2.0, 3.0]),
    inside_share=st.just(0.2),
    network_share=st.just(1.3),
    pair_share=st.sampled_from([1.0, 2.5]),
    relays=st.sampled_from([0.0, 1.0]),
    copy_share=st.sampled_from([0.0, 0.8]),
    idle_speedup=st.sampled_from([1.0, 2.0]),
    halves=st.sampled_from([0.0, 1.0]),
)


def predicted(
    counts: IntArray, shares: IntArray, placement: Placement, slots: Slots, costs: Costs, *, halve: bool = False
) -> FloatArray:
    """Return the times of shares, without overlap and with it."""
    sources = choose_sources(counts, shares, placement.home, placement.resident, slots, costs, NO_LINKS, halve)
    loads = loads_of_shares(counts, shares, costs)
    return np.array(layer_s(loads, sources, exchange_s(counts, shares, loads, costs), costs))


def plan(
    counts: IntArray,
    home: IntArray,
    resident: BoolArray,
    room: int,
    costs: Costs,
    overlap: bool,
    spread: bool = True,
) -> tuple[IntArray, BoolArray, IntArray, bool, float]:
    """Plan with these costs, without stages."""
    tokens, fetches, senders, num_stages, overlapped, predicted_s = plan_by_time(
        counts, home, resident, room, np.array(costs), *NO_LINKS, overlap, False, spread
    )
    assert num_stages == 0
    return tokens, fetches, senders, overlapped, predicted_s


@examples(200)
@given(batches(max_world_size=8, max_experts=24, max_tokens=400), costs_of_machines, st.integers(0, 3), st.booleans())
def test_any_batch_is_planned_whole_and_never_slower_than_where_it_is_held(
    batch: Batch, costs: Costs, num_free: int, overlap: bool
) -> None:
    counts, placement = batch
    room = int(placement.resident.sum(axis=0).max()) + num_free
    slots = slots_in(room, placement.home, placement.resident)
    arguments = (counts, placement.home, placement.resident, room, costs, overlap)
    tokens, (fetch, from_peer, *halves), senders, overlapped, predicted_s = plan(*arguments)
    halved = halves[0] if halves else None
    made = Plan(tokens, fetch, from_peer, senders=senders if senders.size else None, halved=halved)
    made.validate(counts, placement)
    assert not (from_peer & ~fetch).any()
    from_host = (fetch & ~from_peer).sum(axis=0)
    assert (from_host <= np.maximum(room, placement.resident.sum(axis=0))).all(), "there is a slot for every fetch"
    shares = np.ascontiguousarray(made.executed().T)
    times = predicted(counts, shares, placement, slots, costs, halve=halved is not None)
    assert predicted_s == pytest.approx(times[int(overlapped)])
    assert halved is None or (costs.halves > 0 and halved.any())
    assert overlap or not overlapped
    held = predicted(
        counts, shares_where_held(counts, placement.home, placement.resident, costs), placement, slots, costs
    )
    assert predicted_s <= held[0] * (1 + 1e-9)
    chosen = choose_shares(*arguments[:5], NO_LINKS, overlap, False, True)
    assert chosen.predicted_s == pytest.approx(predicted_s) or predicted_s <= chosen.predicted_s / (1 - LEAST_GAIN)


@examples(200)
@given(
    batches(max_world_size=8, max_experts=24, max_tokens=400), costs_of_machines, st.integers(0, 2),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
def test_a_plan_is_what_is_chosen_also_where_little_is_computed(
    batch: Batch, costs: Costs, num_free: int, allowed: tuple[bool, bool, bool]
) -> None:
    counts, placement = batch
    room = int(placement.resident.sum(axis=0).max()) + num_free
    ranks = counts, placement.home, placement.resident, room
    chosen = choose_shares(*ranks, costs, NO_LINKS, *allowed)
    tokens, fetches, _, num_stages, overlapped, predicted_s = plan_by_time(
        *ranks, np.array(costs), *NO_LINKS, *allowed
    )  # fmt: skip
    np.testing.assert_array_equal(tokens.sum(axis=0), chosen.shares.T)
    np.testing.assert_array_equal(fetches[0], (chosen.shares.T > 0) & ~placement.resident)
    assert (num_stages, overlapped) == (max(chosen.stages.num_stages, 0), chosen.overlapped)
    assert predicted_s == pytest.approx(chosen.predicted_s)


@examples(100)
@given(batches(max_world_size=6, max_experts=10, max_tokens=60), costs_of_machines)
def test_levelling_moves_assignments_and_loses_none(batch: Batch, costs: Costs) -> None:
    counts, placement = batch
    shares = shares_where_held(counts, placement.home, placement.resident, costs)
    np.testing.assert_array_equal(shares.sum(axis=0), counts.sum(axis=0))
    level(
        shares,
        counts,
        placement.resident,
        with_free(np.zeros(placement.world_size, np.int64), placement.resident),
        costs,
        True,
    )
    assert (shares >= 0).all()
    np.testing.assert_array_equal(shares.sum(axis=0), counts.sum(axis=0))


@examples(30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2.0, 8.0]))
def test_many_ranks_are_evened_out_by_nodes_without_loss(seed: int, node_ranks: float) -> None:
    world_size, rng = 70, np.random.default_rng(seed)
    counts = make_counts("zipf", world_size, 24, 40, rng)
    counts[:, 0] += 2000  # for one rank, of which a node's others and other nodes have to take
    placement, costs = Placement.from_home(np.arange(24), world_size), COSTS._replace(node_ranks=node_ranks)
    held = shares_where_held(counts, placement.home, placement.resident, costs)
    shares = held.copy()
    level_any(shares, counts, placement.resident, with_free(np.ones(world_size, np.int64), placement.resident), costs)
    assert (shares >= 0).all()
    np.testing.assert_array_equal(shares.sum(axis=0), counts.sum(axis=0))
    assert shares.sum(axis=1).max() < held.sum(axis=1).max() / 10


def test_a_node_as_one_rank_has_every_cost() -> None:
    """What is left out of a tuple would be another type to compiled code, and nobody would say so."""
    node = _of_node(Costs(*range(1, 1 + len(Costs._fields)))._replace(node_ranks=4.0))
    assert len(tuple(node)) == len(Costs._fields)
    assert (node.token_s, node.fetch_s, node.early_s) == (1 / 4, 5 / 4, len(Costs._fields))
    assert node.node_ranks == 0


@examples(100)
@given(batches(max_world_size=7, max_experts=10, max_tokens=60), st.sampled_from([2, 3]))
def test_rows_on_the_wire_are_those_of_the_plan(batch: Batch, node_ranks: int) -> None:
    """Counted by expert and node, they are those of the whole table of who executes whose assignments."""
    counts, placement = batch
    world_size = len(counts)
    costs = COSTS._replace(node_ranks=float(node_ranks), inside_share=0.2, network_share=1.3)
    shares = shares_where_held(counts, placement.home, placement.resident, costs)
    pairs = tokens_of_shares(counts, np.ascontiguousarray(shares.T), node_ranks).sum(axis=1)
    np.fill_diagonal(pairs, 0)
    node = np.arange(world_size) // node_ranks
    inside, outside = np.where(node[:, None] == node, pairs, 0), np.where(node[:, None] == node, 0, pairs)
    slowest = max(
        max(rows.sum(axis=0).max(), rows.sum(axis=1).max()) * share for rows, share in ((inside, 0.2), (outside, 1.3))
    )
    found = exchange_s(counts, shares, loads_of_shares(counts, shares, costs), costs)
    if node_ranks < world_size:
        assert found == pytest.approx(1.0 + 0.5 * slowest)
    totals = counts.sum(axis=0)
    at_home = shares_at_home(totals, placement.home, world_size)
    loads = loads_at_home(counts, totals, placement.home, costs)
    assert exchange_at_home_s(counts, placement.home, loads, costs) == exchange_s(counts, at_home, loads, costs)


@examples(40)
@given(st.integers(0, 2**32 - 1), st.integers(4, 24), st.integers(1, 12))
def test_copies_even_out_as_well_as_a_linear_program(seed: int, world_size: int, num_experts: int) -> None:
    """What has to be executed where its tokens are apart, no split over the holders has a smaller largest load."""
    rng = np.random.default_rng(seed)
    placement = scattered(num_experts, world_size, seed)
    counts = make_counts("zipf", world_size, num_experts, 200, rng)
    shares = shares_where_held(counts, placement.home, placement.resident, COSTS._replace(weights_s=0.0, launch_s=0.0))
    assert (shares.T[~placement.resident] == 0).all()
    several = placement.resident.sum(axis=1) > 1
    own = np.where(placement.resident.T & several, counts, 0)
    best = least_largest_load(own.sum(axis=1), counts.sum(axis=0) - own.sum(axis=0), placement.resident)
    assert shares.sum(axis=1).max() <= 1.03 * best + num_experts


def least_largest_load(base: IntArray, left: IntArray, resident: BoolArray) -> float:
    """Return the least largest load: ``left`` of every expert goes to its holders, who have ``base`` already."""
    num_experts, world_size = resident.shape
    rows = np.zeros((world_size, num_experts * world_size + 1))
    for rank in range(world_size):
        rows[rank, rank:-1:world_size] = 1
    rows[:, -1] = -1
    whole = np.zeros((num_experts, num_experts * world_size + 1))
    for expert in range(num_experts):
        whole[expert, expert * world_size : (expert + 1) * world_size] = resident[expert]
    goal = np.zeros(num_experts * world_size + 1)
    goal[-1] = 1
    bounds = [(0, None if held else 0) for held in resident.reshape(-1)] + [(0, None)]
    found = linprog(goal, A_ub=rows, b_ub=-base, A_eq=whole, b_eq=left, bounds=bounds).fun
    assert found is not None
    return found


def test_an_even_batch_stays_at_home() -> None:
    counts, placement = np.full((4, 16), 50), place("contiguous", 16, 4)
    costs = COSTS._replace(fetch_s=1e4)
    tokens, (fetch, *_), *_ = plan(counts, placement.home, placement.resident, 0, costs, False)
    assert not fetch.any()
    np.testing.assert_array_equal(tokens.sum(axis=0).argmax(axis=1), placement.home)


def test_few_assignments_stay_at_home_because_weights_take_longer() -> None:
    """Decode: time follows the experts that a rank reads, and no split makes those fewer."""
    counts, placement = np.zeros((4, 16), np.int64), place("contiguous", 16, 4)
    counts[:, 0], counts[:, 1:] = 4, 1
    costs = COSTS._replace(token_s=0.01, weights_s=40.0, exchange_token_s=0.0, peer_fetch_s=30.0)
    _, (fetch, *_), *_ = plan(counts, placement.home, placement.resident, 0, costs, True)
    assert not fetch.any()


def test_a_hot_expert_is_executed_where_its_tokens_are_if_that_saves_the_exchange() -> None:
    counts, placement = np.full((4, 8), 5), place("contiguous", 8, 4)
    counts[:, 0] = 1000
    costs = COSTS._replace(exchange_token_s=10.0)
    tokens, (fetch, *_), *_ = plan(counts, placement.home, placement.resident, 3, costs, False)
    assert fetch[0].tolist() == [False, True, True, True]
    assert tokens[np.arange(4), 0, np.arange(4)].min() > 980, "all but what evens the others out"
    *_, predicted_s = plan(counts, placement.home, placement.resident, 3, costs, False)
    *_, without_s = plan(counts, placement.home, placement.resident, 3, costs, False, spread=False)
    assert without_s > predicted_s, "spreading is one of the candidates, and only with the option"


@compiled
def fastest_s(
    counts: IntArray, splits: IntArray, home: IntArray, resident: BoolArray, slots: Slots, costs: Costs, links: Links
) -> float:
    """Return the least predicted time of many splits, int64 ``[num_splits, world_size, num_experts]``."""
    best_s = np.inf
    for i in range(len(splits)):
        shares = splits[i]  # iterating would give arrays of another type, for which all is compiled again
        sources = choose_sources(counts, shares, home, resident, slots, costs, links, False)
        loads = loads_of_shares(counts, shares, costs)
        best_s = min(best_s, layer_s(loads, sources, exchange_s(counts, shares, loads, costs), costs)[0])
    return best_s


@pytest.mark.many
@pytest.mark.parametrize("hot", [40, 90, 200])
@pytest.mark.parametrize("fetch_s", [5.0, 60.0, 400.0])
@pytest.mark.parametrize("row_s", [0.0, 0.5, 4.0])
def test_near_the_best_of_all_splits(hot: int, fetch_s: float, row_s: float) -> None:
    """Two ranks, three experts, 40 000 splits: the choice takes at most a fifth longer than the fastest."""
    counts, placement = np.array([[hot, 20, 6], [hot // 2, 14, 10]]), place("contiguous", 3, 2)
    costs = COSTS._replace(fetch_s=fetch_s, peer_fetch_s=fetch_s / 2, exchange_token_s=row_s)
    slots = with_free(np.ones(2, dtype=np.int64), placement.resident)
    totals = counts.sum(axis=0)
    of_expert = [
        np.unique(np.r_[0, total, counts[0, e], np.linspace(0, total, 33).astype(int)])
        for e, total in enumerate(totals)
    ]
    splits = np.stack(np.meshgrid(*of_expert), axis=-1).reshape(-1, 3)
    best_s = fastest_s(
        counts, np.stack([splits, totals - splits], axis=1), placement.home, placement.resident, slots, costs, NO_LINKS
    )
    chosen = choose_shares(counts, placement.home, placement.resident, 3, costs, NO_LINKS, False, False, True)
    assert chosen.predicted_s <= 1.2 * best_s


def test_copies_even_out_their_ranks_loads() -> None:
    resident = np.array([[True, True, False], [False, True, False], [False, False, True]])
    counts = np.array([[0, 20, 0], [0, 0, 0], [90, 0, 10]])
    shares = shares_where_held(counts, np.array([0, 1, 2]), resident, COSTS)
    # Rank 1 has 20 of its own expert; 90 of expert 0 go to ranks 0 and 1 until both have 55.
    assert shares.tolist() == [[55, 0, 0], [35, 20, 0], [0, 0, 10]]


def test_an_expert_that_takes_longer_to_read_than_to_use_is_never_split() -> None:
    """Decode: the rank that reads fewest executes it whole."""
    resident = np.array([[True, True], [False, True], [True, False], [True, False]])
    shares = shares_where_held(np.array([[1, 0, 1, 1], [2, 1, 0, 1]]), np.array([0, 1, 0, 0]), resident, COSTS)
    assert shares.tolist() == [[0, 0, 1, 2], [3, 1, 0, 0]]
    assert shares_where_held(np.array([[1, 0, 0, 0], [2, 1, 0, 0]]), np.array([0, 1, 0, 0]), resident, COSTS)[0, 0] == 3
