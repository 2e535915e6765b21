from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from baselines.eplb import EPLB
from baselines.eplb_lp import EPLBWithLP, balanced_shares
from harmoeny.placement import BoolArray, IntArray, Placement
from tests.strategies import batches, even_load, examples


def best_largest_load(load: IntArray, resident: BoolArray) -> int:
    """By max-flow min-cut: what only some ranks can execute is on them, so one of them has at least the mean of it."""
    world_size = resident.shape[1]
    best = 0
    for chosen in product([False, True], repeat=world_size):
        ranks = np.array(chosen)
        if ranks.any():
            only_there = load[~(resident & ~ranks).any(axis=1)].sum()
            best = max(best, even_load(int(only_there), int(ranks.sum())))
    return best


@examples(300)
@given(batch=batches(max_world_size=6, max_experts=12))
def test_largest_load_is_the_least_possible(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    plan = EPLBWithLP().plan(counts, placement)
    plan.validate(counts, placement)
    assert not plan.fetch.any()
    assert plan.load().max() == best_largest_load(counts.sum(axis=0), placement.resident)
    assert plan.load().max() <= EPLB().plan(counts, placement).load().max()


@examples(60)
@given(data=st.data())
def test_no_split_in_whole_numbers_is_better(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 3))
    load = np.array(data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)), dtype=np.int64)
    resident = np.array(
        [data.draw(st.lists(st.booleans(), min_size=world_size, max_size=world_size).filter(any)) for _ in load]
    )
    splits = [
        [s for s in product(range(n + 1), repeat=world_size) if sum(s) == n and not np.any(np.array(s)[~held])]
        for n, held in zip(load, resident, strict=True)
    ]
    best = min(np.sum(choice, axis=0).max() for choice in product(*splits))
    shares = balanced_shares(load, resident)
    np.testing.assert_array_equal(shares.sum(axis=1), load)
    assert not shares[~resident].any()
    assert shares.sum(axis=0).max() == best


def test_even_where_the_placement_allows_it() -> None:
    """Every rank shares an expert with the next one, so load can be passed on around the ring."""
    rng = np.random.default_rng(3)
    for world_size in (2, 4, 8):
        resident = np.eye(world_size, dtype=np.bool_) | np.roll(np.eye(world_size, dtype=np.bool_), 1, axis=1)
        for _ in range(20):
            load = rng.integers(50, 100, world_size).astype(np.int64)
            shares = balanced_shares(load, resident)
            assert shares.sum(axis=0).max() == even_load(int(load.sum()), world_size)


def test_long_chains_are_rounded_exactly() -> None:
    """Thirds and sevenths that no floating-point number is equal to, and loads where errors are largest."""
    for world_size in (3, 7, 11):
        for n in (1, 10**9 + 1):
            load = np.full(1, n, dtype=np.int64)
            shares = balanced_shares(load, np.ones((1, world_size), dtype=np.bool_))
            assert shares.sum() == n
            assert shares.max() == even_load(n, world_size)
