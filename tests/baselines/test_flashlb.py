from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from baselines.eplb import balance
from baselines.flashlb import FlashLB, place_jointly
from baselines.kit.replicas import FloatArray
from harmoeny.packing import copies_by_load, longest_first
from harmoeny.placement import BoolArray


def largest_load(load: FloatArray, resident: BoolArray) -> float:
    return float(((load / resident.sum(axis=1))[:, None] * resident).sum(axis=0).max())


def test_no_worse_than_the_published_example() -> None:
    """8 devices with 2 slots: EPLB's largest load is 232, FlashLB's 205."""
    load = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])
    eplb = balance(load.astype(np.int64), np.zeros((8, 8), dtype=np.bool_), 2, 1, 1)
    assert largest_load(load, eplb) == 232
    assert largest_load(load, place_jointly(load, 8, 2)) <= 205


def test_never_worse_than_eplbs_replicas_packed_in_the_same_way_and_close_to_the_best_numbers() -> None:
    rng = np.random.default_rng(0)
    excess = []
    for _ in range(25):
        load = rng.integers(1, 100, 5).astype(np.float64) ** 2
        joint = largest_load(load, place_jointly(load, 3, 3))
        start, _ = longest_first(load, copies_by_load(load, 9, 3), 3, 3)
        assert joint <= largest_load(load, start) + 1e-6
        ways = (np.array(way) for way in product(range(1, 4), repeat=5) if sum(way) == 9)
        best = min(largest_load(load, longest_first(load, way, 3, 3)[0]) for way in ways)
        excess.append(joint / best)
    assert np.mean(excess) < 1.01


def test_a_placement_that_is_good_enough_is_kept() -> None:
    policy = FlashLB(redundant_experts_per_rank=1, least_imbalance=1.3)
    placement = policy.place(0, 8, 4)
    even = np.full((4, 8), 100, dtype=np.int64)
    assert policy.update_placement(0, [even], placement) is None
    hot = even.copy()
    hot[:, 5] = 2000
    moved = policy.update_placement(0, [hot], placement)
    assert moved is not None
    moved.validate()
    assert policy.plan(hot, moved).imbalance() < 1.1 < policy.plan(hot, placement).imbalance()
    assert policy.update_placement(0, [hot], moved) is None
    assert policy.update_placement(0, [hot, hot], placement) is None  # not yet due again


@pytest.mark.parametrize("option", ["interval", "window", "least_imbalance"])
def test_bad_options_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: 0, must be at least 1"):
        FlashLB(**{option: 0}).validate()  # type: ignore[arg-type]
