from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.drop import Drop
from harmoeny.placement import IntArray, Placement, place
from tests.strategies import batches, examples

hundredths = st.integers(1, 400).map(lambda n: n / 100)


@examples(300)
@given(batch=batches(), capacity_factor=hundredths)
def test_overloaded_ranks_keep_exactly_their_capacity(
    batch: tuple[IntArray, Placement], capacity_factor: float
) -> None:
    counts, placement = batch
    world_size, num_experts = counts.shape
    plan = Drop(capacity_factor=capacity_factor).plan(counts, placement)
    average = Fraction(int(counts.sum()), world_size)
    capacity = math.ceil(average * Fraction(str(capacity_factor)))
    wanted = [int(counts[:, placement.home == rank].sum()) for rank in range(world_size)]
    assert plan.load().tolist() == [min(n, capacity) for n in wanted]
    assert not plan.fetch.any()

    kept = plan.tokens[:, np.arange(num_experts), placement.home]
    dropped = plan.dropped(counts)
    np.testing.assert_array_equal(kept + dropped, counts)
    for expert, rank in enumerate(placement.home):
        # What a rank drops, it drops in proportion, off by less than one per sender and expert.
        share = Fraction(capacity, wanted[rank]) if wanted[rank] > capacity else Fraction(1)
        assert all(abs(int(n) - int(c) * share) < 1 for n, c in zip(kept[:, expert], counts[:, expert], strict=True))


def test_dropped_by_hand() -> None:
    # 12 assignments on 2 ranks: capacity 6; rank 0 has 9 and drops a third, rank 1 has 3 and drops nothing.
    counts = np.array([[3, 3, 1], [3, 0, 2]])
    placement = Placement.from_home(np.array([0, 0, 1]), 2)
    plan = Drop().plan(counts, placement)
    assert plan.dropped(counts).tolist() == [[1, 1, 0], [1, 0, 0]]
    assert plan.load().tolist() == [6, 3]


def test_capacity_of_a_decimal_factor_is_not_rounded_up_once_too_often() -> None:
    counts = np.full((1, 100), 1)
    counts = np.concatenate([counts, np.zeros((9, 100), dtype=np.int64)])
    plan = Drop(capacity_factor=1.1).plan(counts, Placement.from_home(np.zeros(100, dtype=np.int64), 10))
    assert plan.load()[0] == 11


def test_nothing_is_dropped_where_everything_fits() -> None:
    counts = np.array([[5, 1], [5, 1]])
    assert Drop(capacity_factor=2.0).plan(counts, place("contiguous", 2, 2)).dropped(counts).sum() == 0


@pytest.mark.parametrize("capacity_factor", [0.0, -1.0, math.inf, math.nan])
def test_capacity_factor_is_a_positive_number(capacity_factor: float) -> None:
    with pytest.raises(ValueError, match=f"capacity_factor: {capacity_factor}, must be a number above 0"):
        Drop(capacity_factor=capacity_factor).validate()
