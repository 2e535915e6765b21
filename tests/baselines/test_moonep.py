from __future__ import annotations

import numpy as np
from hypothesis import given

from baselines.moonep import MoonEP
from harmoeny.placement import IntArray, Placement, place
from tests.strategies import batches, even_load, examples


@examples(300)
@given(batch=batches())
def test_every_rank_executes_exactly_the_mean(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    plan = MoonEP().plan(counts, placement)
    plan.validate(counts, placement)
    total, world_size = int(counts.sum()), len(counts)
    assert set(plan.load().tolist()) <= {total // world_size, even_load(total, world_size)}


@examples(200)
@given(batch=batches())
def test_a_rank_imports_from_one_other_only(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    executed = MoonEP().plan(counts, placement).executed()
    for rank in range(len(counts)):
        imported = np.flatnonzero((executed[:, rank] > 0) & (placement.home != rank))
        assert len(set(placement.home[imported].tolist())) <= 1


def test_the_owner_gives_its_most_popular_experts() -> None:
    counts = np.array([[40, 10, 2, 0], [40, 10, 8, 10]], dtype=np.int64)
    executed = MoonEP().plan(counts, place("contiguous", 4, 2)).executed()
    assert executed.tolist() == [[40, 40], [20, 0], [0, 10], [0, 10]]


def test_ranges_go_to_the_ranks_in_order() -> None:
    counts = np.array([[8, 0], [8, 0]], dtype=np.int64)
    plan = MoonEP().plan(counts, place("contiguous", 2, 2))
    assert plan.tokens[:, 0].tolist() == [[8, 0], [0, 8]]


def test_memory_is_twice_a_ranks_own() -> None:
    assert MoonEP().room(8, 4) == 4
    assert MoonEP().room(3, 4) == 2
    assert MoonEP().room(1, 4) == 1
    assert MoonEP(num_slots=3).room(8, 4) == 3
    assert MoonEP(fetch="none").room(8, 4) is None
