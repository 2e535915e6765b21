"""Placements that follow past batches: room is kept, homes even out, free slots are filled with what pays."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.placement import IntArray, Placement, place
from harmoeny.settle import copy_hottest, copy_own, placements_for, swap_homes
from tests.harmoeny.test_balance import COSTS
from tests.strategies import batches, examples

Batch = tuple[IntArray, Placement]


@examples(100)
@given(batches(max_world_size=6, max_experts=12, max_tokens=60), st.integers(0, 3))
def test_every_placement_is_valid_and_fits(batch: Batch, spare: int) -> None:
    counts, placement = batch
    room = np.bincount(placement.home, minlength=placement.world_size) + spare
    for found in placements_for(
        counts.astype(float), Placement.from_home(placement.home, placement.world_size), room, COSTS
    ):
        found.validate()
        assert (found.resident.sum(axis=0) <= room).all()
        np.testing.assert_array_equal(np.bincount(found.home, minlength=len(room)), room - spare)


@examples(100)
@given(batches(max_world_size=6, max_experts=12, max_tokens=60))
def test_swaps_never_raise_the_largest_load(batch: Batch) -> None:
    counts, placement = batch
    load, world_size = counts.sum(axis=0), placement.world_size
    costs = COSTS._replace(weights_s=0.0)
    swapped = swap_homes(load.astype(float), placement.home, world_size, 0.01, costs)
    before, after = (np.bincount(home, weights=load, minlength=world_size).max() for home in (placement.home, swapped))
    assert after <= before


def test_hot_experts_of_one_rank_are_parted() -> None:
    home = place("contiguous", 8, 4).home
    load = np.array([100.0, 100, 1, 1, 1, 1, 1, 1])
    swapped = swap_homes(load, home, 4, 0.01, COSTS)
    assert swapped[0] != swapped[1]
    assert np.bincount(swapped).tolist() == [2, 2, 2, 2]


def test_free_slots_hold_what_their_rank_needs_or_what_is_hottest() -> None:
    resident = place("contiguous", 4, 4).resident
    counts = np.array([[0.0, 0, 0, 9], [9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0]])
    own = copy_own(counts, resident, np.array([1, 1, 1, 0]))
    assert np.argwhere(own & ~resident).tolist() == [[0, 1], [1, 2], [3, 0]]
    hottest = copy_hottest(np.array([50.0, 5, 4, 1]), resident, np.array([1, 1, 1, 1]))
    assert hottest[0].all(), "the one with the highest load per copy is copied again and again"


def test_every_copy_goes_to_the_highest_load_per_copy_on_the_rank_that_is_then_least_busy() -> None:
    resident = place("contiguous", 3, 3).resident
    found = copy_hottest(np.array([60.0, 40.0, 4.0]), resident, np.array([1, 0, 2]))
    # Expert 0 goes to rank 2, which then has 34; so does expert 1, as only rank 0 has room besides, with 30: to rank 0.
    assert np.argwhere(found & ~resident).tolist() == [[0, 2], [1, 0], [1, 2]]
