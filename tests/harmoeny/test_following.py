"""What follows what: predictions are used only where later batches show that they are right."""

from __future__ import annotations

import numpy as np

from harmoeny.cost import ExpertCost
from harmoeny.following import expect, expect_alike, reliable
from harmoeny.placement import IntArray, Placement, place
from harmoeny.timed import HarMoEny
from harmoeny.trace import RoutingTrace

NUM_EXPERTS, NUM_RANKS = 8, 4
COST = ExpertCost(token_s=1.0, fetch_s=50.0, exchange_token_s=1.0)


def trace(first: IntArray, second: IntArray) -> RoutingTrace:
    """Two layers, one expert per token."""
    return RoutingTrace([first[:, None], second[:, None]], [0, 0])


def shifted() -> RoutingTrace:
    """The expert after the last one follows."""
    first = np.random.default_rng(1).integers(0, NUM_EXPERTS, 4000)
    return trace(first, (first + 1) % NUM_EXPERTS)


def test_what_always_follows_is_reliable() -> None:
    (then,) = reliable(shifted(), NUM_EXPERTS)
    assert then is not None
    np.testing.assert_allclose(then, np.roll(np.eye(NUM_EXPERTS), 1, axis=1))


def test_hot_experts_that_move_and_those_that_stay_are_not_predicted() -> None:
    moving = np.repeat(np.arange(4), 1000)  # one hot expert per batch, in both layers
    assert reliable(trace(moving, moving), NUM_EXPERTS) == [None], "the later batches had others"
    rng = np.random.default_rng(2)
    first, staying = rng.integers(0, NUM_EXPERTS, 4000), rng.choice(NUM_EXPERTS, 4000, p=[0.79, *[0.03] * 7])
    assert reliable(trace(first, staying), NUM_EXPERTS) == [None], "popularity says as much"


def test_ranks_get_equal_shares_of_what_is_expected() -> None:
    counts = np.random.default_rng(3).integers(0, 90, (NUM_RANKS, NUM_EXPERTS))
    (then,) = reliable(shifted(), NUM_EXPERTS)
    assert then is not None
    alike, exact = expect_alike(counts, then), expect(counts, then)
    np.testing.assert_allclose(alike.sum(axis=0), exact.sum(axis=0))
    np.testing.assert_allclose(alike.sum(axis=1), exact.sum(axis=1))


class TestLookingAhead:
    placement = place("contiguous", NUM_EXPERTS, NUM_RANKS)

    def policy(self, *, ahead: bool = True) -> HarMoEny:
        policy = HarMoEny(fetch="async", spare_slots=1, ahead=ahead).calibrated(COST)
        return policy.fitted(shifted(), NUM_EXPERTS, NUM_RANKS)

    def batch(self, hot: int, tokens: int) -> IntArray:
        counts = np.full((NUM_RANKS, NUM_EXPERTS), tokens // 20)
        counts[:, hot] = tokens
        return counts

    def test_spare_slots_get_what_follows_a_hot_expert(self) -> None:
        changed = self.policy().look_ahead(0, self.batch(2, 200), self.placement)
        assert changed is not None
        np.testing.assert_array_equal(changed.home, self.placement.home)
        assert changed.resident[3].all(), "expert 3 follows expert 2"
        assert (changed.resident.sum(axis=0) <= 3).all()

    def test_other_copies_give_way_and_homes_never(self) -> None:
        resident = self.placement.resident.copy()
        resident[0] = True
        changed = self.policy().look_ahead(0, self.batch(2, 200), Placement(self.placement.home, resident))
        assert changed is not None
        changed.validate()
        assert changed.resident[3].all()
        assert changed.resident[0].sum() < NUM_RANKS

    def test_nothing_is_copied_where_it_would_be_late_or_off(self) -> None:
        assert self.policy().look_ahead(0, self.batch(2, 10), self.placement) is None, "no time for a copy"
        assert self.policy(ahead=False).look_ahead(0, self.batch(2, 200), self.placement) is None
        assert self.policy().look_ahead(1, self.batch(2, 200), self.placement) is None, "nothing follows the last layer"
