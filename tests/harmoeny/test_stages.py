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
from harmoeny.held import slots_in, with_free
from harmoeny.lines import Stages, stage_tokens, stages_of_experts
from harmoeny.placement import BoolArray, IntArray, Placement, place
from harmoeny.plan import Plan, home_tokens, pairs_of_shares, plan_from_tokens, tokens_of_shares
from harmoeny.policy import Policy
from harmoeny.predict import SLICES, Costs, Loads, Sources, layer_s, loads_of_shares, no_sources, work_s
from harmoeny.sources import choose_sources
from harmoeny.stage_number import MOST_STAGES, best_stages, reads_most, weight
from harmoeny.stage_times import soonest_stages, staged_s
from harmoeny.stage_wire import columns_of
from harmoeny.stages import cut_for, divide, group, in_stages, line_up
from harmoeny.timed import HarMoEny
from harmoeny.wire import exchange_s
from tests.harmoeny.test_balance import COSTS, costs_of_machines
from tests.strategies import batches, examples

Batch = tuple[IntArray, Placement]
some_batches = batches(max_world_size=6, max_experts=16, max_tokens=200)
#: Processors, which copy and are shared, know no latency of exchanges, and so have no stages.
costs_of_devices = costs_of_machines.map(lambda costs: costs._replace(copy_share=0.0, idle_speedup=1.0))


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


def cut(counts: IntArray, shares: IntArray, resident: BoolArray, num_stages: int, cut_rows: float = 0.0) -> Stages:
    """Return stages of shares, cut from lines."""
    stages: Stages = divide(line_up(counts, shares, resident), counts, shares, num_stages, cut_rows, 0.3)
    return stages


def grouped(shares: IntArray, resident: BoolArray, num_stages: int) -> Stages:
    """Return stages of shares, of whole experts."""
    stages: Stages = group(line_up(shares, shares, resident), shares, num_stages)
    return stages


def seconds(
    counts: IntArray, shares: IntArray, resident: BoolArray, stages: Stages, loads: Loads, sources: Sources,
    one_way_s: float, costs: Costs,
) -> float:  # fmt: skip
    """Return what these stages are predicted to take."""
    lines = line_up(counts, shares, resident)
    columns = columns_of(counts, shares, costs)
    return float(staged_s(lines, counts, shares, columns, stages, loads, sources, one_way_s, costs))


@examples(150)
@given(some_batches, st.integers(1, 7), st.sampled_from([0.0, 3.0, 1e9]), st.integers(0, 2**32 - 1))
def test_lines_hold_every_row_once_and_what_is_fetched_last(
    batch: Batch, num_stages: int, cut_rows: float, seed: int
) -> None:
    counts, placement = batch
    shares = any_shares(batch, seed)
    executed = np.ascontiguousarray(shares.T)
    stages = cut(counts, shares, placement.resident, num_stages, cut_rows)
    assert stages.num_stages == num_stages
    tokens = tokens_of_shares(counts, executed)
    Plan(tokens, (executed > 0) & ~placement.resident, stages=stages).validate(counts, placement)
    for rank, share in enumerate(shares):
        there = share > 0
        fetched = there & ~placement.resident[:, rank]
        if fetched.any():
            held_end = max((stages.begins[:, rank] + share)[there & ~fetched], default=0)
            assert stages.begins[fetched, rank].min() >= held_end
        if cut_rows == 1e9:  # nothing pays for a cut
            assert set(stages.cuts[:, rank]) <= {0, *(stages.begins[:, rank] + share)[there]}


@examples(100)
@given(some_batches, st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_whole_experts_make_stages_of_about_the_sizes_that_are_meant(batch: Batch, num_stages: int, seed: int) -> None:
    counts, placement = batch
    shares = any_shares(batch, seed)
    stages = grouped(shares, placement.resident, num_stages)
    executed = np.ascontiguousarray(shares.T)
    Plan(
        tokens_of_shares(counts, executed), (executed > 0) & ~placement.resident, stages=stages
    ).validate(counts, placement)  # fmt: skip
    rows = np.diff(stages.bounds(executed), axis=0)
    assert ((rows > 0).sum(axis=0) <= 1).all(), "none is cut"
    fetched = (executed > 0) & ~placement.resident
    assert (rows[-1][fetched] == executed[fetched]).all()
    weights = np.array([weight(stage, num_stages) for stage in range(num_stages)])
    for rank, share in enumerate(shares):
        if not fetched[:, rank].any():
            load = np.diff(stages.cuts[:, rank])
            assert (load / weights).max() <= ((load + share.max()) / weights).min(), "as full as another could be"


@examples(100)
@given(st.integers(2, 5), st.integers(2, 9), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_cuts_part_what_travels_as_is_meant(world_size: int, num_experts: int, num_stages: int, seed: int) -> None:
    """Where every row travels, each cut is no farther from where it is meant than a cut may move."""
    rng = np.random.default_rng(seed)
    shares = np.zeros((world_size, num_experts), dtype=np.int64)
    shares[0] = rng.integers(1, 2000, num_experts)
    counts = np.zeros_like(shares)
    counts[1] = shares[0]
    resident = np.ascontiguousarray(shares.T > 0)
    stages = cut(counts, shares, resident, num_stages)
    weights = np.array([weight(stage, num_stages) for stage in range(num_stages)])
    total = shares[0].sum()
    meant = np.concatenate([[0], np.cumsum(weights)]) * total / weights.sum()
    farthest = 0.3 * np.minimum(weights[1:], weights[:-1]) * total / weights.sum()
    # Next to a cut that was moved as far as it may be, one may have to go around the same expert.
    assert (
        abs(stages.cuts[1:-1, 0] - meant[1:-1]) <= 2 * farthest + shares[0].max() * (num_stages > 1) * 0.5 + 1
    ).all()
    if shares[0].max() > 0.9 * total and num_stages > 2:
        assert len(set(stages.cuts[:, 0])) > 3, "a hot expert does not fill a stage"


def test_a_hot_expert_is_cut_and_what_stays_is_apart() -> None:
    """By hand: rank 0 executes a hot expert of others' rows, and one of its own rows, which need not wait for them."""
    counts = np.array([[0, 500, 0], [900, 0, 100]])
    shares = np.array([[900, 500, 100], [0, 0, 0]])
    resident = np.array([[True, False], [True, False], [True, False]])
    stages = cut(counts, shares, resident, 4)
    # Own rows, 500, first; of the 1,000 that travel, in stages of 1, 2 and 1 parts, the small expert's are last.
    assert stages.begins[:, 0].tolist() == [500, 0, 1400]
    assert stages.cuts[:, 0].tolist() == [0, 500, 833, 1166, 1500] or stages.cuts[1, 0] == 500
    whole = cut(counts, shares, resident, 4, cut_rows=1e9)
    assert set(whole.cuts[:, 0].tolist()) <= {0, 500, 1400, 1500}


@examples(100)
@given(some_batches, st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_stages_of_experts_are_lines_without_cuts(batch: Batch, num_stages: int, seed: int) -> None:
    counts, placement = batch
    executed = np.ascontiguousarray(any_shares(batch, seed).T)
    of_expert = np.random.default_rng(seed).integers(0, num_stages, executed.shape)
    stages = stages_of_experts(of_expert, executed)
    tokens = tokens_of_shares(counts, executed)
    Plan(tokens, (executed > 0) & ~placement.resident, stages=stages).validate(counts, placement)
    found = np.diff(stages.bounds(executed), axis=0)
    for stage, rows in enumerate(found):
        np.testing.assert_array_equal(rows, np.where(of_expert == stage, executed, 0))


def test_wrong_stages_are_refused() -> None:
    counts, placement = np.full((2, 2), 5), place("contiguous", 2, 2)
    plan = plan_from_tokens(home_tokens(counts, placement.home), placement)
    good = stages_of_experts(np.zeros((2, 2), dtype=np.int64), plan.executed())
    replace(plan, stages=good).validate(counts, placement)
    beyond, apart = good.cuts.copy(), good.begins.copy()
    beyond[-1, 1] = 11
    apart[1, 1] = 3
    for stages, message in (
        (good._replace(cuts=beyond), r"plan.stages.cuts: do not go from 0 to all rows at \[rank\] = \[1\]"),
        (good._replace(cuts=good.cuts[:1]), r"plan.stages.cuts: shape \(1, 2\)"),
        (good._replace(begins=apart), r"plan.stages.begins: experts lie on each other, or apart, at \[rank\] = \[1\]"),
        (good._replace(begins=good.begins[:1]), r"plan.stages.begins: shape \(1, 2\), must be \(2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(plan, stages=stages).validate(counts, placement)
    with pytest.raises(ValueError, match=r"plan.stages: must be None with plan.source_groups"):
        replace(plan, stages=good, source_groups=[range(2)]).validate(counts, placement)


@examples(150)
@given(some_batches, costs_of_devices, st.integers(0, 2**32 - 1))
def test_one_stage_takes_what_a_layer_without_stages_takes(batch: Batch, costs: Costs, seed: int) -> None:
    counts, placement = batch
    shares, slots = any_shares(batch, seed), slots_in(0, placement.home, placement.resident)
    sources = choose_sources(counts, shares, placement.home, placement.resident, slots, costs, NO_LINKS, False)
    loads = loads_of_shares(counts, shares, costs)
    one_way_s = exchange_s(counts, shares, loads, costs)
    stages = cut(counts, shares, placement.resident, 1)
    sources = sources._replace(waiting=np.zeros_like(sources.waiting))  # stages are taken to have slots free in time
    # Only what is ordered on arrival, and the results back, is counted before the products, not around them.
    without_copies = costs._replace(copy_token_s=0.0)
    ordered = loads.received.all() and not sources.fetched.any()
    for machine in (without_copies, costs if ordered else without_copies):
        found = seconds(counts, shares, placement.resident, stages, loads, sources, one_way_s, machine)
        exchanged_s = one_way_s if loads.sent.any() else 0.0  # of nothing there is no exchange
        assert found == pytest.approx(layer_s(loads, sources, exchanged_s, machine)[0])


@examples(150)
@given(some_batches, costs_of_devices, st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_stages_hide_no_more_than_there_is(batch: Batch, costs: Costs, num_stages: int, seed: int) -> None:
    counts, placement = batch
    shares = any_shares(batch, seed)
    slots = slots_in(0, placement.home, placement.resident)
    sources = choose_sources(counts, shares, placement.home, placement.resident, slots, costs, NO_LINKS, False)
    loads = loads_of_shares(counts, shares, costs)
    one_way_s = exchange_s(counts, shares, loads, costs)
    stages = cut(counts, shares, placement.resident, num_stages)
    found = seconds(counts, shares, placement.resident, stages, loads, sources, one_way_s, costs)
    computed_s = max(work_s(loads.work, rank, costs) for rank in range(len(counts)))
    exchanged_s = 2 * one_way_s if loads.sent.any() else 0.0
    assert found >= max(computed_s, exchanged_s, sources.ready_s.max()) * (1 - 1e-9)
    plain_s = layer_s(loads, sources, one_way_s, costs)[0]
    # An exchange per stage may take as long as all of it where one rank's rows are all in one stage.
    launches_s = num_stages * costs.launch_s * (costs.grouped or 0)
    again_s = 2 * (num_stages - 1) * (one_way_s + launches_s) + 2 * loads.executed.max() * costs.copy_token_s
    apart_s = loads.work[SLICES].max() * costs.weights_s + 2 * costs.launch_s
    cuts_s = (num_stages - 1) * (costs.launch_s + costs.weights_s + costs.tile_tokens * costs.token_s)
    assert found <= (plain_s + again_s + apart_s + cuts_s) * (1 + 1e-9)


def test_stages_by_hand() -> None:
    """Two ranks send each other 10 rows for each of two experts: rows take 10 and 1, products 10."""
    costs = COSTS._replace(
        exchange_token_s=1.0, exchange_latency_s=1.0, launch_s=0.0, weights_s=0.0, copy_token_s=0.0, token_s=0.5
    )
    counts = np.full((2, 4), 10)
    shares = np.array([[20, 20, 0, 0], [0, 0, 20, 20]])
    resident = np.ascontiguousarray(shares.T > 0)
    sources = choose_sources(
        counts, shares, np.array([0, 0, 1, 1]), resident, with_free(np.zeros(2, int), resident), costs, NO_LINKS, False
    )
    loads = loads_of_shares(counts, shares, costs)
    stages = cut(counts, shares, resident, 2)
    assert stages.cuts.tolist() == [[0, 0], [20, 20], [40, 40]]
    # There at 11 and 22, computed at 21 and 32, back at 33 and 44.
    assert seconds(counts, shares, resident, stages, loads, sources, 21.0, costs) == 44.0
    assert layer_s(loads, sources, 21.0, costs)[0] == 21.0 + 20.0 + 21.0
    # With copies of 0.1 the rows are gathered after 4, those of the first stage after 2, so all is there 2 later.
    # Results are added in 8: half of them before the last are back, these in 4, and in 2 what they are added to. Rows
    # of both experts would be ordered in 4, and their results: here there is one a stage.
    costs = costs._replace(copy_token_s=0.1)
    loads = loads_of_shares(counts, shares, costs)
    assert seconds(counts, shares, resident, stages, loads, sources, 21.0, costs) == 44.0 + 2.0 + 4.0 + 2.0
    assert layer_s(loads, sources, 21.0, costs)[0] == 21.0 + 20.0 + 21.0 + 4.0 + 2 * 4.0 + 8.0


@examples(150)
@given(costs_of_devices, st.integers(1, 6), st.integers(1, 20), st.sampled_from([3, 30, 300]))
def test_no_other_number_of_stages_is_much_faster(costs: Costs, world_size: int, held: int, rows: int) -> None:
    counts = np.full((world_size, held * world_size), rows)
    placement = place("contiguous", held * world_size, world_size)
    shares = np.ascontiguousarray(np.where(placement.at_home, rows * world_size, 0).T)
    sources = no_sources(world_size, held * world_size)
    loads = loads_of_shares(counts, shares, costs)
    one_way_s = exchange_s(counts, shares, loads, costs)
    number, gain_s = best_stages(loads, one_way_s, costs)
    assert 1 <= number <= MOST_STAGES
    assert gain_s >= 0
    if costs.exchange_latency_s == 0:
        assert number == 1, "what a stage costs is not known"
        return
    even = costs._replace(copy_token_s=0.0)  # which stages do not change
    resident = placement.resident
    lines = line_up(counts, shares, resident)
    whole = reads_most(loads, costs)
    times = [
        seconds(
            counts, shares, resident,
            group(lines, shares, n) if whole else cut_for(lines, counts, shares, n, loads, one_way_s, costs),
            loads, sources, one_way_s, even,
        )
        for n in range(1, MOST_STAGES + 1)
    ]  # fmt: skip
    chosen = times[number - 1]
    assert chosen <= 1.2 * min(times[:held])
    assert chosen <= 1.3 * min(times), "with experts cut"


@examples(100)
@given(some_batches, costs_of_devices, st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_more_stages_are_tried_where_a_layer_takes_long(batch: Batch, costs: Costs, number: int, seed: int) -> None:
    counts, placement = batch
    shares, resident = any_shares(batch, seed), placement.resident
    slots = slots_in(0, placement.home, resident)
    sources = choose_sources(counts, shares, placement.home, resident, slots, costs, NO_LINKS, False)
    loads = loads_of_shares(counts, shares, costs)
    one_way_s = exchange_s(counts, shares, loads, costs)

    def soonest(layer_takes_s: float) -> float:
        stages, found_s = soonest_stages(
            number, counts, shares, resident, loads, sources, one_way_s, layer_takes_s, costs
        )
        executed = np.ascontiguousarray(shares.T)
        Plan(
            tokens_of_shares(counts, executed), (executed > 0) & ~resident, stages=stages
        ).validate(counts, placement)  # fmt: skip
        assert seconds(counts, shares, resident, stages, loads, sources, one_way_s, costs) == found_s
        return float(found_s)

    lines = line_up(counts, shares, resident)
    cut_or_whole = [cut_for(lines, counts, shares, number, loads, one_way_s, costs), group(lines, shares, number)]
    usual = cut_or_whole[reads_most(loads, costs)]
    assert soonest(0.0) == seconds(counts, shares, resident, usual, loads, sources, one_way_s, costs)
    assert soonest(1e9) <= soonest(0.0), "there is time for all of them"


@examples(100)
@given(batches(max_world_size=6, max_experts=12, max_tokens=100), st.sampled_from([2, 3]), st.integers(0, 2**32 - 1))
def test_what_a_stage_has_between_nodes_is_counted(batch: Batch, node_ranks: int, seed: int) -> None:
    """With products that take no time, a layer is all stages' exchanges there and back, of a plan's own tokens."""
    counts, placement = batch
    world_size = len(counts)
    costs = COSTS._replace(
        node_ranks=float(node_ranks), inside_share=0.2, network_share=1.3, exchange_latency_s=2.0,
        copy_token_s=0.0, token_s=0.0, launch_s=0.0, weights_s=0.0, fetch_s=0.0, peer_fetch_s=0.0,
    )  # fmt: skip
    shares = any_shares(batch, seed)
    executed = np.ascontiguousarray(shares.T)
    loads = loads_of_shares(counts, shares, costs)
    sources = no_sources(*counts.shape)
    stages = cut(counts, shares, placement.resident, 3)
    tokens = tokens_of_shares(counts, executed, node_ranks if node_ranks < world_size else 0)
    pairs = stage_tokens(tokens, stages.bounds(executed)[:, None], executed).sum(axis=2)
    node = np.arange(world_size) // node_ranks
    inside = node[:, None] == node
    exchange = [(costs.inside_share, inside & ~np.eye(world_size, dtype=bool)), (costs.network_share, ~inside)]
    wanted = 0.0
    for sent in pairs:
        busy = [share * max((sent * where).sum(axis=axis).max() for axis in (0, 1)) for share, where in exchange]
        if max(busy) > 0:
            wanted += 2 * (costs.exchange_latency_s + max(busy) * costs.exchange_token_s)
    if node_ranks < world_size:
        one_way_s = exchange_s(counts, shares, loads, costs)
        found = seconds(counts, shares, placement.resident, stages, loads, sources, one_way_s, costs)
        assert found == pytest.approx(wanted)


@examples(100)
@given(some_batches, st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_pairs_by_stage_are_those_of_the_plan(batch: Batch, num_stages: int, node_ranks: int, seed: int) -> None:
    counts, placement = batch
    shares = any_shares(batch, seed)
    executed = np.ascontiguousarray(shares.T)
    stages = cut(counts, shares, placement.resident, num_stages)
    tokens = tokens_of_shares(counts, executed, node_ranks)
    wanted = stage_tokens(tokens, stages.bounds(executed)[:, None], executed).sum(axis=2)
    assert wanted.sum() == counts.sum()
    np.testing.assert_array_equal(pairs_of_shares(counts, executed, stages, node_ranks), wanted)


@examples(100)
@given(some_batches, st.integers(0, 2**32 - 1))
def test_plans_have_the_stages_that_the_option_says(batch: Batch, seed: int) -> None:
    counts, placement = batch
    tokens = tokens_of_shares(counts, np.ascontiguousarray(any_shares(batch, seed).T))
    plan = Plan(tokens, (tokens.sum(axis=0) > 0) & ~placement.resident)
    assert in_stages(plan, 1) is plan
    assert in_stages(plan, None) is plan
    staged = in_stages(plan, 3)
    staged.validate(counts, placement)
    assert staged.stages is not None
    assert in_stages(staged, 2) is staged, "who divided a plan knows better"
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
