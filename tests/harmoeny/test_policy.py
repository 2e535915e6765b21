from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.static_ep import StaticEP
from harmoeny.cost import ExpertCost
from harmoeny.placement import place
from tests.strategies import examples


@examples()
@given(
    token_s=st.floats(1e-9, 1e-2, allow_subnormal=False),
    ratio=st.floats(0, 300),
    whole=st.booleans(),
)
def test_threshold_is_the_least_number_of_tokens_that_hides_a_fetch(token_s: float, ratio: float, whole: bool) -> None:
    fetch_s = token_s * (round(ratio) if whole else ratio)
    needed = 1
    while needed * token_s < fetch_s:
        needed += 1
    assert ExpertCost(token_s=token_s, fetch_s=fetch_s).threshold_tokens() == needed


def test_a_threshold_is_at_least_one_token() -> None:
    assert ExpertCost(token_s=1e-3, fetch_s=0.0).threshold_tokens() == 1


@pytest.mark.parametrize("kind", ["contiguous", "round_robin"])
def test_without_fetching_every_rank_holds_every_expert(kind: str) -> None:
    placement = StaticEP(placement=kind, fetch="none").place(0, 5, 3)
    assert placement.resident.all()
    np.testing.assert_array_equal(placement.home, place(kind, 5, 3).home)


def test_slots_mean_nothing_without_fetching() -> None:
    with pytest.raises(ValueError, match="num_slots: 4, must be null with fetch=none"):
        StaticEP(fetch="none", num_slots=4).validate()
