from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.fastermoe import FasterMoE, choose_shadows
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, IntArray, Placement, place
from tests.strategies import batches, examples

COSTS = st.tuples(st.floats(1e-6, 1e-3), st.floats(1e-6, 1e-1), st.floats(0, 1e-3))


def modelled_s(counts: IntArray, placement: Placement, shadowed: set[int], costs: tuple[float, float, float]) -> float:
    """The documented model, assignment by assignment."""
    token_s, shadow_s, exchange_s = costs
    world_size, num_experts = counts.shape
    load, received, shadows = [0] * world_size, [0] * world_size, 0
    for expert in range(num_experts):
        for src in range(world_size):
            dst = src if expert in shadowed else int(placement.home[expert])
            load[dst] += int(counts[src, expert])
            received[dst] += int(counts[src, expert]) if src != dst else 0
        shadows += expert in shadowed and not placement.resident[expert].all()
    return token_s * max(load) + 2 * exchange_s * max(received) + shadow_s * shadows


def chosen(counts: IntArray, placement: Placement, costs: tuple[float, float, float]) -> set[int]:
    shadowed: BoolArray = choose_shadows(counts, placement.home, placement.resident, *costs)
    return {int(e) for e in np.flatnonzero(shadowed)}


@examples(150)
@given(popularity=st.lists(st.integers(0, 200), min_size=1, max_size=7), costs=COSTS)
def test_best_of_all_sets_with_one_expert_per_rank_and_the_same_counts_everywhere(
    popularity: list[int], costs: tuple[float, float, float]
) -> None:
    n = len(popularity)
    counts = np.tile(np.array(popularity, dtype=np.int64), (n, 1))
    placement = place("contiguous", n, n)
    best = min(
        modelled_s(counts, placement, set(shadowed), costs)
        for size in range(n + 1)
        for shadowed in combinations(range(n), size)
    )
    ours = modelled_s(counts, placement, chosen(counts, placement, costs), costs)
    assert ours == pytest.approx(best, rel=1e-9)


@examples(150)
@given(batch=batches(max_world_size=6, max_experts=12, max_tokens=300), costs=COSTS)
def test_best_number_of_the_most_popular_experts(
    batch: tuple[IntArray, Placement], costs: tuple[float, float, float]
) -> None:
    counts, placement = batch
    popularity = counts.sum(axis=0)
    hottest_first = sorted(range(len(popularity)), key=lambda e: -popularity[e])
    best = min(modelled_s(counts, placement, set(hottest_first[:n]), costs) for n in range(len(popularity) + 1))
    shadowed = chosen(counts, placement, costs)
    assert modelled_s(counts, placement, shadowed, costs) == pytest.approx(best, rel=1e-9)
    cold = set(range(len(popularity))) - shadowed
    assert min((popularity[e] for e in shadowed), default=0) >= max((popularity[e] for e in cold), default=0) or (
        not shadowed
    )


def test_shadows_where_it_pays_and_not_before() -> None:
    """Expert 0 has 900 of 1000 assignments on 2 ranks: a shadow lowers the largest load from 900 to 550."""
    counts = np.array([[450, 50], [450, 50]], dtype=np.int64)
    placement = place("contiguous", 2, 2)
    for shadow_s, fetched in ((0.36, False), (0.34, True)):
        policy = FasterMoE().calibrated(ExpertCost(token_s=1e-3, fetch_s=shadow_s))
        plan = policy.plan(counts, placement)
        assert plan.load().tolist() == ([450, 550] if fetched else [900, 100])
        assert plan.fetch.tolist() == [[False, fetched], [False, False]]
    # Over a slow link 400 assignments less to receive and to return make the dearer shadow pay too.
    policy = FasterMoE(exchange_tokens_per_s=1e4).calibrated(ExpertCost(token_s=1e-3, fetch_s=0.36))
    assert policy.plan(counts, placement).load().tolist() == [450, 550]


@examples(100)
@given(batch=batches(max_world_size=6, max_experts=12), fetch_s=st.floats(1e-6, 1e-2))
def test_assignments_are_executed_at_home_or_where_they_are(batch: tuple[IntArray, Placement], fetch_s: float) -> None:
    counts, placement = batch
    plan = FasterMoE().calibrated(ExpertCost(token_s=1e-6, fetch_s=fetch_s)).plan(counts, placement)
    shadowed = choose_shadows(counts, placement.home, placement.resident, 1e-6, fetch_s, 0.0)
    for expert in range(counts.shape[1]):
        where = np.diag(counts[:, expert]) if shadowed[expert] else np.zeros((len(counts),) * 2, dtype=np.int64)
        if not shadowed[expert]:
            where[:, placement.home[expert]] = counts[:, expert]
        np.testing.assert_array_equal(plan.tokens[:, expert], where)


def test_an_expert_that_all_ranks_hold_is_shadowed_for_nothing() -> None:
    counts = np.array([[450, 50], [450, 50]], dtype=np.int64)
    policy = FasterMoE(fetch="none").calibrated(ExpertCost(token_s=1e-9, fetch_s=1e3))
    plan = policy.plan(counts, policy.place(0, 2, 2))
    assert plan.load().max() < 900
    assert not plan.fetch.any()


def test_what_was_set_is_not_calibrated() -> None:
    policy = FasterMoE(shadow_s=0.5).calibrated(ExpertCost(token_s=1e-3, fetch_s=0.1))
    assert (policy.token_s, policy.shadow_s) == (1e-3, 0.5)
    assert policy.fetch == "peer"


def test_planning_needs_costs() -> None:
    with pytest.raises(ValueError, match="shadow_s: null, must be calibrated"):
        FasterMoE(token_s=1.0).plan(np.ones((2, 2), dtype=np.int64), place("contiguous", 2, 2))


@pytest.mark.parametrize("name", ["token_s", "shadow_s", "exchange_tokens_per_s"])
def test_costs_must_be_positive(name: str) -> None:
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"{name}: .*, must be above 0, or null"):
            FasterMoE(**{name: value}).validate()  # type: ignore[arg-type]


def test_without_shadowing_everything_goes_home_and_without_smart_scheduling_nothing_is_special() -> None:
    counts = np.array([[450, 50], [450, 50]], dtype=np.int64)
    policy = FasterMoE(shadowing=False, smart_scheduling=False)
    policy.validate()
    policy = policy.calibrated(ExpertCost(token_s=1e-3, fetch_s=1e-9))
    plan = policy.plan(counts, place("contiguous", 2, 2))
    assert plan.load().tolist() == [900, 100]
    assert plan.source_groups is None
    assert FasterMoE(shadowing=False).plan(counts, place("contiguous", 2, 2)).source_groups == [[0], [1]]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (FasterMoE(group_size=0), "group_size: 0, must be at least 1"),
        (FasterMoE(group_size=2, smart_scheduling=False), "group_size: 2, must be 1, .* with smart_scheduling=false"),
        (FasterMoE(token_s=1.0, shadowing=False), "token_s: 1.0, must be null with shadowing=false"),
        (FasterMoE(exchange_tokens_per_s=1.0, shadowing=False), "exchange_tokens_per_s: 1.0, must be null"),
    ],
)
def test_options_of_a_part_that_is_off_are_refused(policy: FasterMoE, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        policy.validate()
