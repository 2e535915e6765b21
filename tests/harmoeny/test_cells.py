"""Passes over ranks and experts: the same as numpy's."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.cells import by_expert, executed_by, totals_of
from harmoeny.compiled import compiled
from harmoeny.placement import IntArray
from tests.strategies import examples


@compiled
def found_in(rank: int, shares: IntArray) -> IntArray:
    """Return int64, the experts of which a rank executes assignments."""
    found = np.empty(shares.shape[1], dtype=np.int64)
    return found[: executed_by(rank, shares, found)]


@examples(100)
@given(st.integers(1, 20), st.integers(1, 40), st.sampled_from([0.0, 0.1, 0.9]), st.integers(0, 2**32 - 1))
def test_passes_are_numpys(world_size: int, num_experts: int, part: float, seed: int) -> None:
    """Whether or not there are whole blocks of eight, and few or many of them are empty."""
    rng = np.random.default_rng(seed)
    cells = np.where(rng.random((world_size, num_experts)) < part, rng.integers(1, 9, (world_size, num_experts)), 0)
    np.testing.assert_array_equal(by_expert(cells), cells.T)
    np.testing.assert_array_equal(totals_of(cells), cells.sum(axis=0))
    np.testing.assert_array_equal(totals_of(cells > 0), (cells > 0).sum(axis=0))
    for rank in range(world_size):
        np.testing.assert_array_equal(found_in(rank, cells), np.flatnonzero(cells[rank]))
