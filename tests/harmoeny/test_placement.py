from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.placement import PLACEMENTS, Placement, place
from tests.strategies import examples

sizes = {"num_experts": st.integers(1, 200), "world_size": st.integers(1, 32)}


@examples()
@given(**sizes, kind=st.sampled_from(PLACEMENTS))
def test_experts_are_spread_evenly_the_first_ranks_taking_what_is_over(
    num_experts: int, world_size: int, kind: str
) -> None:
    placement = place(kind, num_experts, world_size)
    placement.validate()
    held = Counter(placement.home.tolist())
    base, extra = divmod(num_experts, world_size)
    assert [held[rank] for rank in range(world_size)] == [base + (rank < extra) for rank in range(world_size)]
    assert (placement.num_experts, placement.world_size) == (num_experts, world_size)
    for expert in range(num_experts):
        assert np.flatnonzero(placement.resident[expert]).tolist() == [placement.home[expert]]


@examples()
@given(**sizes)
def test_order_of_experts(num_experts: int, world_size: int) -> None:
    contiguous = place("contiguous", num_experts, world_size).home.tolist()
    assert contiguous == sorted(contiguous)
    assert place("round_robin", num_experts, world_size).home.tolist() == [e % world_size for e in range(num_experts)]


def test_a_placement_by_hand() -> None:
    assert place("contiguous", 5, 3).home.tolist() == [0, 0, 1, 1, 2]
    assert place("round_robin", 5, 3).home.tolist() == [0, 1, 2, 0, 1]


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="placement: 'random', must be one of contiguous, round_robin"):
        place("random", 4, 2)


@pytest.mark.parametrize("rank", [-1, 3])
def test_home_must_exist(rank: int) -> None:
    placement = Placement(home=np.array([0, 2, rank]), resident=np.ones((3, 3), dtype=np.bool_))
    with pytest.raises(ValueError, match=rf"placement.home\[2\]: rank {rank}, must be 0 to 2"):
        placement.validate()


def test_home_must_hold_its_expert() -> None:
    resident = np.ones((3, 2), dtype=np.bool_)
    resident[1, 0] = False
    with pytest.raises(ValueError, match=r"placement\.resident: expert 1 is not resident on its home rank 0"):
        Placement(home=np.array([1, 0, 0]), resident=resident).validate()


def test_every_expert_needs_a_home() -> None:
    with pytest.raises(ValueError, match=r"placement.home: shape \(2,\), must be \(3,\)"):
        Placement(home=np.array([0, 1]), resident=np.ones((3, 2), dtype=np.bool_)).validate()
