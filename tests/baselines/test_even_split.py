from __future__ import annotations

from itertools import cycle

import numpy as np
from hypothesis import given

from baselines.even_split import EvenSplit
from harmoeny.placement import IntArray, Placement
from tests.strategies import batches, even_load, examples


@examples(300)
@given(batch=batches())
def test_loads_and_shares_differ_by_at_most_one(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    plan = EvenSplit().plan(counts, placement)
    assert np.ptp(plan.load()) <= 1
    assert plan.load().max() == even_load(int(counts.sum()), plan.world_size)
    assert (np.ptp(plan.executed(), axis=1) <= 1).all()


@examples()
@given(batch=batches(max_world_size=5, max_experts=6, max_tokens=30))
def test_same_as_dealing_one_by_one(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    world_size, num_experts = counts.shape
    dealt = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    ranks = cycle(range(world_size))
    for expert in range(num_experts):
        for src in range(world_size):
            for _ in range(counts[src, expert]):
                dealt[src, expert, next(ranks)] += 1
    np.testing.assert_array_equal(EvenSplit().plan(counts, placement).tokens, dealt)
