from __future__ import annotations

import numpy as np
from hypothesis import given

from baselines.static_ep import StaticEP
from harmoeny.placement import IntArray, Placement
from tests.strategies import batches, examples


@examples()
@given(batch=batches(max_world_size=8, max_experts=16))
def test_everything_is_executed_at_home(batch: tuple[IntArray, Placement]) -> None:
    counts, placement = batch
    plan = StaticEP().plan(counts, placement)
    for expert, home in enumerate(placement.home):
        np.testing.assert_array_equal(plan.tokens[:, expert, home], counts[:, expert])
    assert plan.tokens.sum() == counts.sum()
    assert not plan.fetch.any()
