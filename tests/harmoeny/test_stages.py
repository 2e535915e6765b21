"""Stages of experts: what is divided stays whole, and what they take against sums made in another way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.eps_moe import EpsMoE
from baselines.fastermoe import FasterMoE
from baselines.static_ep import StaticEP
from harmoeny.cost import NO_LINKS
from harmoeny.held import free_slots
from harmoeny.placement import IntArray, Placement, place
from harmoeny.plan import Plan, pairs_of_shares, tokens_of_shares
from harmoeny.policy import Policy
from harmoeny.predict import SLICES, Costs, layer_s, loads_of_shares, no_sources, work_s
from harmoeny.stages import MOST_STAGES, best_stages, divide, in_stages, staged_s, weight
from harmoeny.timed import HarMoEny
from harmoeny.wire import choose_sources, exchange_s
from tests.harmoeny.test_balance import COSTS, costs_of_machines
from tests.strategies import batches, examples

Batch = tuple[IntArray, Placement]
some_batches = batches(max_world_size=6, max_experts=16, max_tokens=200)


def any_shares(batch: Batch, seed: int) -> IntArray:
    """Return int64 ``[world_size, num_experts]``: some experts are split over some ranks."""
    counts, placement = batch
    rng, (world_size, num_experts) = np.random.default_rng(seed), counts.shape
    takers = placement.at_home | (rng.random((num_experts, world_size)) < 0.2)
    weights = takers * rng.random((num_experts, world_size)) + 1e-9 * placement.at_home
    chances = weights / weights.sum(axis=1, keepdims=True)
    return np.ascontiguousarray(rng.multinomial(counts.sum(axis=0), chances).T).astype(np.int64)


def test_stages_grow_from_both_ends() -> None:
    for number, wanted in ((1, [1]), (2, [1, 1]), (3, [1, 2, 1]), (5, [1, 2, 4, 2, 1]), (7, [1, 2, 4, 4, 4, 2, 1])):
        assert [weight(stage, number) for stage in range(number)] == wanted


@examples(100)
@given(some_batches, st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_every_rank_has_stages_of_about_the_sizes_that_are_meant(batch: Batch, num_stages: int, seed: int) -> None:
    counts, placement = batch
    shares = any_shares(batch, seed)
    stages = divide(shares, placement.resident, num_stages)
    assert stages.shape == counts.T.shape
    assert ((stages >= 0) & (stages < num_stages)).all()
    fetched = (shares.T > 0) & ~placement.resident
    assert (stages[fetched] == num_stages - 1).all()
    weights = np.array([weight(stage, num_stages) for stage in range(num_stages)])
    for rank, share in enumerate(shares):
        if not fetched[:, rank].any():
            load = np.bincount(stages[:, rank], share, num_stages)
            assert (load / weights).max() <= ((load + share.max()) / weights).min(), "as full as another could be"


@examples(150)
@given(some_batches, costs_of_machines, st.integers(0, 2**32 - 1))
def test_one_stage_takes_what_a_layer_without_stages_takes(batch: Batch, costs: Costs, seed: int) -> None:
    counts, placement = batch
    shares, free = any_shares(batch, seed), free_slots(placement.home, placement.resident, 0)
    sources = choose_sources(counts, shares, placement.home, placement.resident, free, costs, NO_LINKS)
    loads = loads_of_shares(counts, shares, costs)
    one_way_s = exchange_s(counts, shares, loads, costs)
    stages = divide(shares, placement.resident, 1)
    # Only what is ordered on arrival, and the results back, is counted before the products, not around them.
    without_copies = costs._replace(copy_token_s=0.0)
    for machine in (without_copies, costs if not sources.fetched.any() else without_copies):
        found = staged_s(counts, shares, stages, 1, loads, sources, one_way_s, machine)
        assert found == pytest.approx(layer_s(loads, sources, one_way_s, machine)[0])


@examples(150)
@given(some_batches, costs_of_machines, st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_stages_hide_no_more_than_there_is(batch: Batch, costs: Costs, num_stages: int, seed: int) -> None:
    counts, placement = batch
    shares = any_shares(batch, seed)
    free = free_slots(placement.home, placement.resident, 0)
    sources = choose_sources(counts, shares, placement.home, placement.resident, free, costs, NO_LINKS)
    loads = loads_of_shares(counts, shares, costs)
    one_way_s = exchange_s(counts, shares, loads, costs)
    stages = divide(shares, placement.resident, num_stages)
    found = staged_s(counts, shares, stages, num_stages, loads, sources, one_way_s, costs)
    computed_s = max(work_s(loads.work, rank, costs) for rank in range(len(counts)))
    exchanged_s = 2 * (one_way_s + (num_stages - 1) * costs.exchange_latency_s)
    assert found >= max(computed_s, exchanged_s, sources.ready_s.max()) * (1 - 1e-9)
    plain_s = layer_s(loads, sources, one_way_s, costs)[0]
    # An exchange per stage may take as long as all of it where one rank's rows are all in one stage.
    launches_s = num_stages * costs.launch_s * (costs.grouped or 0)
    again_s = 2 * (num_stages - 1) * (one_way_s + launches_s) + 2 * loads.executed.max() * costs.copy_token_s
    apart_s = loads.work[SLICES].max() * costs.weights_s + 2 * costs.launch_s
    assert found <= (plain_s + again_s + apart_s) * (1 + 1e-9)


def test_stages_by_hand() -> None:
    """Two ranks send each other 10 rows for each of two experts: rows take 10 and 1, products 10."""
    costs = COSTS._replace(
        exchange_token_s=1.0, exchange_latency_s=1.0, launch_s=0.0, weights_s=0.0, copy_token_s=0.0, token_s=0.5
    )
    counts = np.full((2, 4), 10)
    shares = np.array([[20, 20, 0, 0], [0, 0, 20, 20]])
    resident = shares.T > 0
    sources = choose_sources(counts, shares, np.array([0, 0, 1, 1]), resident, np.zeros(2, int), costs, NO_LINKS)
    loads = loads_of_shares(counts, shares, costs)
    stages = divide(shares, resident, 2)
    assert stages[0, 0] != stages[1, 0]
    assert stages[2, 1] != stages[3, 1]
    # There at 11 and 22, computed at 21 and 32, back at 33 and 44.
    assert staged_s(counts, shares, stages, 2, loads, sources, 21.0, costs) == 44.0
    assert layer_s(loads, sources, 21.0, costs)[0] == 21.0 + 20.0 + 21.0


@examples(150)
@given(costs_of_machines, st.integers(1, 6), st.integers(1, 20), st.sampled_from([3, 30, 300]))
def test_no_other_number_of_stages_is_much_faster(costs: Costs, world_size: int, held: int, rows: int) -> None:
    counts = np.full((world_size, held * world_size), rows)
    placement = place("contiguous", held * world_size, world_size)
    shares = np.ascontiguousarray(np.where(placement.at_home, rows * world_size, 0).T)
    sources = no_sources(world_size, held * world_size)
    loads = loads_of_shares(counts, shares, costs)
    one_way_s = exchange_s(counts, shares, loads, costs)
    number, gain_s = best_stages(loads, one_way_s, costs)
    assert 1 <= number <= min(held, MOST_STAGES)
    assert gain_s >= 0
    if costs.exchange_latency_s == 0:
        assert number == 1, "what a stage costs is not known"
        return
    even = costs._replace(copy_token_s=0.0)  # which stages do not change
    times = [
        staged_s(
            counts, shares, divide(shares, placement.resident, n), n, loads,
            sources, one_way_s, even,
        )
        for n in range(1, held + 1)
    ]  # fmt: skip
    chosen = times[number - 1]
    assert chosen <= 1.15 * min(times)


@examples(100)
@given(some_batches, st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_pairs_by_stage_are_those_of_the_plan(batch: Batch, num_stages: int, node_ranks: int, seed: int) -> None:
    counts, placement = batch
    shares = any_shares(batch, seed)
    executed = np.ascontiguousarray(shares.T)
    stages = divide(shares, placement.resident, num_stages)
    tokens = tokens_of_shares(counts, executed, node_ranks)
    wanted = [tokens.sum(axis=1, where=stages == stage) for stage in range(stages.max() + 1)]
    np.testing.assert_array_equal(pairs_of_shares(counts, executed, stages, node_ranks), wanted)


@examples(100)
@given(some_batches, st.integers(0, 2**32 - 1))
def test_plans_have_the_stages_that_the_option_says(batch: Batch, seed: int) -> None:
    counts, placement = batch
    tokens = tokens_of_shares(counts, np.ascontiguousarray(any_shares(batch, seed).T))
    plan = Plan(tokens, (tokens.sum(axis=0) > 0) & ~placement.resident)
    assert in_stages(plan, 1) is plan
    assert in_stages(plan, None) is plan
    divided = in_stages(plan, 3)
    divided.validate(counts, placement)
    assert divided.expert_stages is not None
    assert in_stages(divided, 2) is divided, "who divided a plan knows better"
    grouped = replace(plan, source_groups=[range(len(counts))])
    assert in_stages(grouped, 3) is grouped


def test_numbers_of_stages_are_checked() -> None:
    refused: list[tuple[Policy, str]] = [
        (StaticEP(num_stages=0), "num_stages: 0, must be at least 1"),
        (HarMoEny(num_stages=0), "num_stages: 0, must be at least 1, or null"),
        (StaticEP(num_stages=None), "num_stages: null, must be a number of at least 1"),
        (FasterMoE(num_stages=2), "num_stages: 2, must be 1: how this system exchanges rows is fixed"),
    ]
    for policy, message in refused:
        with pytest.raises(ValueError, match=message):
            policy.validate()
    allowed: list[Policy] = [StaticEP(num_stages=4), HarMoEny(), EpsMoE(), EpsMoE(num_stages=2)]
    for policy in allowed:
        policy.validate()
