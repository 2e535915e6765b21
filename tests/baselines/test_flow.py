from __future__ import annotations

import numpy as np

from tests.baselines.flow import least_largest_load, least_largest_loads
from tests.strategies import scattered


def test_minimum_cuts_and_maximum_flows_agree() -> None:
    rng = np.random.default_rng(0)
    residents = [scattered(7, 4, seed).resident for seed in range(12)]
    load = rng.integers(0, 500, 7)
    flows = [least_largest_load(load, resident) for resident in residents]
    assert least_largest_loads(load, np.stack(residents)).tolist() == flows
