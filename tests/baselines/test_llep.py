"""LLEP's plan rules, one by one, on cases that were worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from baselines.llep import LLEP
from harmoeny.placement import IntArray, Placement, place
from tests.strategies import batches, examples


def executed(popularity: list[int], world_size: int, **options: float) -> list[list[int]]:
    """Return what ranks execute of every expert, where rank 0 has all tokens and experts live in turn on the ranks."""
    counts = np.zeros((world_size, len(popularity)), dtype=np.int64)
    counts[0] = popularity
    placement = place("contiguous", len(popularity), world_size)
    policy = LLEP(**options)  # type: ignore[arg-type]
    policy.validate()
    plan = policy.plan(counts, placement)
    plan.validate(counts, placement)
    rows: list[list[int]] = plan.executed().tolist()
    return rows


def test_an_owner_below_its_capacity_keeps_all() -> None:
    assert executed([5, 5, 4, 6], 2, capacity_factor=1.0, min_tokens=1) == [[5, 0], [5, 0], [0, 4], [0, 6]]


def test_what_an_owner_cannot_take_goes_to_the_least_loaded_rank() -> None:
    # Capacity 40 / 4: the owner of 0 takes 10 of 25, ranks 3 and 2 (2 and 5 there) take 8 and 5, rank 1 the last 2.
    assert executed([25, 8, 5, 2], 4, capacity_factor=1.0, min_tokens=1) == [
        [10, 2, 5, 8], [0, 8, 0, 0], [0, 0, 5, 0], [0, 0, 0, 2]
    ]  # fmt: skip


def test_experts_come_by_falling_popularity_and_pending_ones_count() -> None:
    # Capacity 15. Expert 0 (16) comes first; its owner still has expert 1 (4) pending, so it takes 11 and spills 5.
    assert executed([16, 4, 7, 3], 2, capacity_factor=1.0, min_tokens=1) == [[11, 5], [4, 0], [0, 7], [0, 3]]


def test_an_owner_without_room_spills_everything() -> None:
    # Capacity 10, and expert 1 alone is pending with 12: nothing of expert 0 stays, and 2 of expert 1 go, too.
    assert executed([13, 12, 0, 0, 0, 5], 3, capacity_factor=1.0, min_tokens=1)[:2] == [[0, 10, 3], [10, 0, 2]]


def test_chunks_below_the_minimum_are_left_out_unless_they_are_the_rest() -> None:
    # Capacity 10: rank 3 could take 8, which is too little, and so could nobody else: it is forced to take all 15.
    assert executed([25, 8, 5, 2], 4, capacity_factor=1.0, min_tokens=9)[0] == [10, 0, 0, 15]
    # After 8 for rank 3 and 5 for rank 2, the remaining 2 are the rest and go where there is room for them.
    assert executed([25, 8, 5, 2], 4, capacity_factor=1.0, min_tokens=5)[0] == [10, 2, 5, 8]


def test_the_capacity_factor_leaves_more_at_home() -> None:
    assert executed([30, 10], 2, capacity_factor=1.1, min_tokens=1) == [[22, 8], [0, 10]]
    assert executed([30, 10], 2, capacity_factor=1.5, min_tokens=1) == [[30, 0], [0, 10]]


def test_below_the_least_imbalance_nothing_moves() -> None:
    moved, kept = [[22, 8], [0, 10]], [[30, 0], [0, 10]]
    assert executed([30, 10], 2, min_tokens=1, least_imbalance=1.5) == moved
    assert executed([30, 10], 2, min_tokens=1, least_imbalance=1.51) == kept


def test_ranges_follow_the_order_of_the_sources_and_begin_at_home() -> None:
    counts = np.array([[0, 6], [0, 6]], dtype=np.int64)
    plan = LLEP(capacity_factor=1.0, min_tokens=1).plan(counts, place("contiguous", 2, 2))
    assert plan.tokens[:, 1].tolist() == [[0, 6], [6, 0]]  # the first six assignments stay at home, on rank 1


@examples(200)
@given(batch=batches())
def test_ranks_above_the_capacity_are_at_most_one_chunk_above(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    plan = LLEP(min_tokens=7).plan(counts, placement)
    plan.validate(counts, placement)
    capacity = np.floor(round(int(counts.sum()) * 1.1 / len(counts), 6))
    assert plan.load().max() <= capacity + max(7, counts.sum(axis=0).max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 0.9}, "capacity_factor: 0.9, must be a number of at least 1"),
        ({"min_tokens": 0}, "min_tokens: 0, must be at least 1"),
        ({"least_imbalance": 0.5}, "least_imbalance: 0.5, must be at least 1, or null"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLEP(**options).validate()  # type: ignore[arg-type]
