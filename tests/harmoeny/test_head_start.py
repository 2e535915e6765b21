"""What ranks execute before the plan is known: their own rows of what they hold, no more than there is time for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.head_start import HeadStart, early_of_all, early_rows
from harmoeny.placement import BoolArray, IntArray, Placement, place
from harmoeny.timed import HarMoEny
from tests.harmoeny.test_balance import COSTS
from tests.strategies import batches, examples

head_starts = st.builds(
    HeadStart,
    most_rows=st.integers(1, 500),
    slice_rows=st.sampled_from([0, 3, 40]),
    least_rows=st.integers(1, 60),
    tile_rows=st.sampled_from([1, 4, 16]),
    batch_rows=st.sampled_from([20, 10**6]),
)


def one_after_another(own: IntArray, resident: BoolArray, head_start: HeadStart) -> list[int]:
    """Choose for one rank as the rule is told, an expert at a time."""
    most, beside, least, tile, batch = head_start
    early, left = [0] * len(own), most
    if own.sum() > batch:
        return early
    whole = {e: int(own[e]) // tile * tile for e in range(len(own)) if resident[e]}
    for expert in sorted(whole, key=lambda e: (-whole[e], e)):
        left -= beside
        rows = min(whole[expert], left // tile * tile)
        if rows < least:
            return early
        early[expert] = rows
        left -= whole[expert]
    return early


@examples(200)
@given(batches(max_world_size=6, max_experts=20, max_tokens=300), head_starts)
def test_early_rows_are_a_ranks_own_of_what_it_holds_within_the_budget(
    batch: tuple[IntArray, Placement], head_start: HeadStart
) -> None:
    counts, placement = batch
    early = early_rows(counts, placement.resident, head_start)
    assert (early >= 0).all()
    assert (early <= counts).all()
    assert not early[~placement.resident.T].any()
    assert not (early % head_start.tile_rows).any()
    assert not ((early > 0) & (early < head_start.least_rows)).any()
    taken = early.sum(axis=1) + head_start.slice_rows * (early > 0).sum(axis=1)
    assert (taken <= head_start.most_rows).all()
    for rank, own in enumerate(counts):
        assert early[rank].tolist() == one_after_another(own, placement.resident[:, rank], head_start)
        # A rank that has heard of nobody chooses the same for itself.
        alone = early_rows(own[None], np.ascontiguousarray(placement.resident[:, rank : rank + 1]), head_start)
        np.testing.assert_array_equal(alone[0], early[rank])


def test_shared_experts_are_never_early() -> None:
    counts = np.array([[9, 0, 9], [0, 2, 9]])
    resident = place("contiguous", 2, 2).resident
    early = early_of_all(counts, resident, HeadStart(100, 0, 3, 1, 9))
    assert early is not None
    assert early.tolist() == [[9, 0, 0], [0, 0, 0]]
    assert early_of_all(counts, resident, HeadStart(100, 0, 10, 1, 9)) is None
    assert early_of_all(counts, resident, None) is None


def test_a_budget_becomes_rows() -> None:
    # A row takes 1 s and is gathered in 0.1 s; an expert has a launch of 3 s and weights of 2 s.
    assert HeadStart.of(11.5, COSTS) == HeadStart(most_rows=10, slice_rows=3, least_rows=2, tile_rows=1, batch_rows=320)
    grouped = COSTS._replace(grouped=1.0, tile_tokens=4.0)
    assert HeadStart.of(12.0, grouped) == HeadStart(
        most_rows=8, slice_rows=0, least_rows=4, tile_rows=4, batch_rows=256
    )
    assert HeadStart.of(12.0, grouped._replace(weights_s=5.0)) == HeadStart(8, 0, 5, 4, 256)
    assert HeadStart.of(5.0, COSTS) is None, "time for 4 rows, where an expert takes at least 5"


def test_no_rows_are_begun_that_take_less_than_beginning_them() -> None:
    """As on an H200 whose eighth was 9 % slower with a head start than without."""
    beside = COSTS._replace(grouped=1.0, early_s=2.0)  # 2 s, and a launch of 3 s
    assert HeadStart.of(9.9, beside) is None
    begun = HeadStart.of(10.0, beside)
    assert begun is not None
    assert begun.most_rows == 4, "5 s are left for rows of 1.1 s"


def test_only_who_has_to_wait_begins_early() -> None:
    placement = place("contiguous", 8, 2)
    costs = COSTS._replace(token_s=1e-9, copy_token_s=0.0, launch_s=0.0, weights_s=0.0, exchange_latency_s=1e-6)
    policy = HarMoEny(costs=costs._asdict())
    # 1 us to exchange counts, and 20 ns per rank and expert to plan.
    assert policy.begin_early(placement) == HeadStart(1320, 0, 1, 1, 32 * 1320)
    assert HarMoEny(costs=costs._asdict(), head_start=False).begin_early(placement) is None
    assert HarMoEny(costs=costs._asdict(), fetch="none").begin_early(placement) is None
    assert HarMoEny(costs=costs._replace(exchange_latency_s=0.0)._asdict()).begin_early(placement) is None
    assert policy.begin_early(place("contiguous", 8, 1)) is None
    lacking = Placement(placement.home, placement.resident & (np.arange(8) > 0)[:, None])
    assert policy.begin_early(lacking) is None


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_at_decode_sizes_nothing_is_begun(num_tokens: int) -> None:
    """Weights of 176 rows, as of the layers of Qwen3-30B-A3B on an H100: no expert has as many of a rank's rows."""
    costs = COSTS._replace(token_s=16e-9, weights_s=176 * 16e-9, launch_s=2e-6, exchange_latency_s=2e-5, grouped=1.0)
    placement = place("contiguous", 128, 8)
    head_start = HarMoEny(costs=costs._replace(copy_token_s=2e-9)._asdict()).begin_early(placement)
    assert head_start is not None
    assert early_of_all(np.full((8, 128), num_tokens), placement.resident, head_start) is None
