from itertools import product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.data.routing import gini, gini_by_round, sorted_shares
from tests.strategies import examples


@examples()
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20))
def test_gini_is_half_the_mean_difference_of_all_pairs_relative_to_the_mean(values: list[int]) -> None:
    pairs = [abs(a - b) for a, b in product(values, values)]
    expected = float(np.mean(pairs)) / (2 * float(np.mean(values))) if sum(values) else 0.0
    assert gini(values) == pytest.approx(expected, abs=1e-12)


def test_gini_of_what_is_known() -> None:
    assert gini([7, 7, 7]) == pytest.approx(0)
    assert gini([0, 0, 0, 9]) == pytest.approx(3 / 4)


ROUTING = pd.DataFrame(
    {
        "round": [0, 0, 1, 1],
        "layer": [0, 1, 0, 1],
        "stack": [0, 1, 0, 1],
        "counts": [[30, 0, 0], [1, 1, 1], [10, 10, 10], [0, 0, 0]],
    }
)


def test_gini_of_a_round_weighs_layers_by_their_assignments() -> None:
    assert gini_by_round(ROUTING).to_dict() == pytest.approx({0: (30 * 2 / 3 + 3 * 0) / 33, 1: 0.0})


def test_shares_are_those_of_all_rounds_most_popular_first() -> None:
    shares = sorted_shares(ROUTING)
    first = shares[shares["layer"] == 0]
    assert first["position"].tolist() == [1, 2, 3]
    assert first["share"].tolist() == pytest.approx([40 / 60, 10 / 60, 10 / 60])
    assert shares.loc[shares["layer"] == 1, "share"].tolist() == pytest.approx([1 / 3] * 3)
    empty = pd.DataFrame({"round": [0], "layer": [0], "stack": [0], "counts": [[0, 0, 0]]})
    assert sorted_shares(empty).empty
