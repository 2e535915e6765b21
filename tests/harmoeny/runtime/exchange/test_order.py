from __future__ import annotations

from random import Random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from harmoeny.placement import IntArray
from harmoeny.runtime.exchange.order import by_expert
from tests.strategies import examples

some_blocks = st.tuples(st.integers(1, 4), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.int64, shape, elements=st.sampled_from([0, 0, 1, 3]))
)


@examples(200)
@given(some_blocks, st.randoms(use_true_random=False), st.booleans())
def test_rows_are_ordered_by_expert_and_source_unless_they_arrive_so(
    received: IntArray, random: Random, ascending: bool
) -> None:
    order = np.flatnonzero(received.any(axis=0)).tolist()
    if not ascending:
        random.shuffle(order)
    arrived = [
        (order.index(expert), source)
        for source, numbers in enumerate(received)
        for expert, number in enumerate(numbers)
        for _ in range(number)
    ]
    found = by_expert(received, torch.device("cpu"), None if ascending else order)
    rows = range(len(arrived)) if found is None else found.tolist()
    assert [arrived[row] for row in rows] == sorted(arrived)
    if ascending and min(received.any(axis=1).sum(), received.any(axis=0).sum()) <= 1:
        assert found is None, "from one source or of one expert"
