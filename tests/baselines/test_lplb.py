from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.eplb_lp import balanced_shares
from baselines.lplb import LPLB, neighbour
from harmoeny.placement import BoolArray, IntArray, Placement
from tests.baselines.flow import least_largest_load
from tests.strategies import batches, even_load, examples


@examples(200)
@given(batch=batches(max_world_size=8, max_experts=24))
def test_close_to_the_maximum_flow_in_five_steps_and_never_below_it(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    load, resident = counts.sum(axis=0), placement.resident
    best = least_largest_load(load, resident)
    plan = LPLB().plan(counts, placement)
    plan.validate(counts, placement)
    assert not plan.fetch.any()
    # Whole numbers round up by less than one per replica on the rank.
    assert best <= plan.load().max() <= best * 1.02 + resident.sum(axis=0).max()
    assert balanced_shares(load, resident).sum(axis=0).max() == best


@pytest.mark.parametrize(("world_size", "num_experts"), [(8, 128), (16, 64), (64, 256)])
def test_close_to_the_maximum_flow_at_the_sizes_of_serving(world_size: int, num_experts: int) -> None:
    rng = np.random.default_rng(0)
    policy = LPLB()
    start = policy.place(0, num_experts, world_size)
    for _ in range(5):
        popularity = rng.permutation(np.arange(1, num_experts + 1.0) ** -rng.uniform(0.3, 1.5))
        counts = rng.multinomial(8192, popularity / popularity.sum(), size=world_size).astype(np.int64)
        placement = policy.update_placement(0, [counts], start) or start
        load = counts.sum(axis=0)
        best = least_largest_load(load, placement.resident)
        assert best <= policy.plan(counts, placement).load().max() <= best * 1.002
        assert balanced_shares(load, placement.resident).sum(axis=0).max() == best


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("slot", range(4))
def test_every_rank_is_the_neighbour_of_one_other(world_size: int, slot: int) -> None:
    neighbours = [neighbour(rank, slot, world_size) for rank in range(world_size)]
    assert sorted(neighbours) == list(range(world_size))
    assert all(rank != other for rank, other in enumerate(neighbours))


def test_the_graph_of_eight_ranks_is_a_cube() -> None:
    assert [neighbour(5, slot, 8) for slot in range(3)] == [4, 7, 1]


@examples(100)
@given(
    world_size=st.integers(1, 9),
    experts_per_rank=st.integers(1, 4),
    redundant=st.integers(0, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_slot_i_replicates_the_ith_most_popular_expert_of_neighbour_i(
    world_size: int, experts_per_rank: int, redundant: int, seed: int
) -> None:
    policy = LPLB(redundant_experts_per_rank=redundant)
    num_experts = world_size * experts_per_rank
    counts = np.random.default_rng(seed).permutation(num_experts * world_size).reshape(world_size, num_experts)
    start = policy.place(0, num_experts, world_size)
    placement = policy.update_placement(0, [counts], start) or start
    placement.validate()
    load, home = counts.sum(axis=0), placement.home
    assert (np.bincount(home, minlength=world_size) == experts_per_rank).all()
    assert placement.resident.sum(axis=1).max() <= 2
    if placement is start:
        return
    expected: BoolArray = Placement.from_home(home, world_size).resident
    for rank in range(world_size if world_size > 1 else 0):
        for slot in range(min(redundant, experts_per_rank)):
            theirs = np.flatnonzero(home == neighbour(rank, slot, world_size))
            expected[theirs[np.argsort(-load[theirs], kind="stable")[slot]], rank] = True
    np.testing.assert_array_equal(placement.resident, expected)


def test_a_ring_of_replicas_is_evened_out() -> None:
    rng = np.random.default_rng(3)
    eye = np.eye(8, dtype=np.bool_)
    placement = Placement(np.arange(8), eye | np.roll(eye, 1, axis=1))
    counts = rng.integers(50, 100, (8, 8))
    assert LPLB(num_steps=8).plan(counts, placement).load().max() <= even_load(int(counts.sum()), 8) + 2


def test_fewer_steps_are_less_exact() -> None:
    rng = np.random.default_rng(1)
    counts = rng.multinomial(8192, np.arange(1, 65.0) ** -1 / (np.arange(1, 65.0) ** -1).sum(), size=16).astype(
        np.int64
    )
    placement = LPLB().place(0, 64, 16)
    loads = [int(LPLB(num_steps=n).plan(counts, placement).load().max()) for n in (1, 2, 5)]
    assert loads[0] > loads[1] > loads[2]


@pytest.mark.parametrize("option", ["interval", "window", "num_steps"])
def test_bad_options_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: 0, must be at least 1"):
        LPLB(**{option: 0}).validate()  # type: ignore[arg-type]
