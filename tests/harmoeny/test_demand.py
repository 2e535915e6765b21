"""Expected demand: against the popularity that batches were drawn from, and caches by it against LRU and MRS."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.cpu_gpu_lru import CpuGpuLru
from baselines.hybrimoe import HybriMoE
from baselines.kit.cache import CachePolicy
from harmoeny.demand import Demand, hold_expected
from harmoeny.placement import BoolArray, IntArray, Placement
from tests.strategies import examples

NUM_EXPERTS, TOP_K, NUM_SLOTS = 16, 4, 4
Floats = npt.NDArray[np.float64]


def drawn(popularity: Floats, num_tokens: int, rng: np.random.Generator) -> IntArray:
    """int64 ``[num_tokens, top_k]``: tokens draw without repetition."""
    noise = rng.gumbel(size=(num_tokens, len(popularity)))
    return np.argsort(-(np.log(popularity) + noise), axis=1)[:, :TOP_K]


def counted(experts: IntArray) -> IntArray:
    return np.bincount(experts.ravel(), minlength=NUM_EXPERTS)[None].astype(np.int64)


def sequences(reuse: float, rng: np.random.Generator, num_prompts: int = 12, num_steps: int = 40) -> list[IntArray]:
    """Prompts of 64 tokens, each with steps of one, whose experts stay with a probability of ``reuse`` each."""
    batches: list[IntArray] = []
    for _ in range(num_prompts):
        popularity = rng.permutation(1.0 / np.arange(1, NUM_EXPERTS + 1))
        batches.append(counted(drawn(popularity, 64, rng)))
        latest = drawn(popularity, 1, rng)[0]
        for _ in range(num_steps):
            kept = [e for e in latest if rng.random() < reuse]
            latest = np.array((kept + [e for e in drawn(popularity, 1, rng)[0] if e not in kept])[:TOP_K])
            batches.append(counted(latest))
    return batches


def hit_rate(batches: list[IntArray], hold: Callable[[list[IntArray], BoolArray], BoolArray]) -> float:
    """Share of the steps' assignments whose experts are held; ``hold`` says what is held after a batch."""
    held = np.arange(NUM_EXPERTS) < NUM_SLOTS
    hits = total = 0
    for number, counts in enumerate(batches, 1):
        if counts.sum() == TOP_K:
            hits += int(counts[0, held].sum())
            total += TOP_K
        held = hold(batches[:number], held)
        assert held.sum() <= NUM_SLOTS
    return hits / total


def by_policy(policy: CachePolicy) -> Callable[[list[IntArray], BoolArray], BoolArray]:
    def hold(history: list[IntArray], held: BoolArray) -> BoolArray:
        placement = Placement(np.zeros(NUM_EXPERTS, np.int64), held[:, None])
        return (policy.retain(0, history, placement) or placement).resident[:, 0]

    return hold


def by_scores(policy: HybriMoE) -> Callable[[list[IntArray], BoolArray], BoolArray]:
    """HybriMoE's scores, with everything that was used copied in."""

    def hold(history: list[IntArray], held: BoolArray) -> BoolArray:
        scores = policy.scores([counts[0] for counts in history[-policy.history_window :]])
        allowed = held | (history[-1][0] > 0)
        return np.isin(np.arange(NUM_EXPERTS), np.argsort(-np.where(allowed, scores, -1.0), kind="stable")[:NUM_SLOTS])

    return hold


def by_demand(copies: int) -> Callable[[list[IntArray], BoolArray], BoolArray]:
    demand, nothing, here = Demand(), np.zeros((NUM_EXPERTS, 1), np.bool_), np.ones((NUM_EXPERTS, 1), np.bool_)

    def hold(history: list[IntArray], held: BoolArray) -> BoolArray:
        shares = demand.expect(history, 32)
        many = demand.num_assignments
        return hold_expected(shares, many, held[:, None], nothing, here, NUM_SLOTS, np.array([copies]))[:, 0]

    return hold


@pytest.mark.parametrize("reuse", [0.0, 0.4])
def test_a_cache_by_demand_hits_at_least_as_often_as_lru_and_decaying_scores(reuse: float) -> None:
    """With prompts that differ, whether a token's experts come again or not: 0.4 as in Mixtral."""
    batches = sequences(reuse, np.random.default_rng(1))
    lru = hit_rate(batches, by_policy(CpuGpuLru(num_slots=NUM_SLOTS)))
    mrs = hit_rate(batches, by_scores(HybriMoE(num_slots=NUM_SLOTS)))
    ours = hit_rate(batches, by_demand(copies=TOP_K))
    assert ours > max(lru, mrs) - 0.01
    if reuse == 0.0:
        assert ours > max(lru, mrs) + 0.04


def test_where_popularity_stays_hits_are_nearly_those_of_the_most_popular_experts() -> None:
    rng = np.random.default_rng(2)
    popularity = rng.permutation(1.0 / np.arange(1, NUM_EXPERTS + 1))
    chosen = drawn(popularity, 20000, rng)
    best = np.sort(np.bincount(chosen.ravel(), minlength=NUM_EXPERTS))[-NUM_SLOTS:].sum() / chosen.size
    batches = [counted(drawn(popularity, 64, rng)), *(counted(row) for row in drawn(popularity, 2000, rng))]
    assert best - 0.03 < hit_rate(batches, by_demand(copies=1)) < best + 0.03


def test_expected_shares_are_popularity_and_the_latest_batch_as_far_as_it_comes_again() -> None:
    rng = np.random.default_rng(3)
    popularity = 1.0 / np.arange(1, NUM_EXPERTS + 1)
    chosen = drawn(popularity, 40000, rng)
    marginal = np.bincount(chosen.ravel(), minlength=NUM_EXPERTS) / chosen.size
    independent = [counted(drawn(popularity, 64, rng)) for _ in range(200)]
    np.testing.assert_allclose(Demand().expect(independent, 200), marginal, atol=0.015)
    one, other = counted(np.array([0, 1, 2, 3])), counted(np.array([8, 9, 10, 11]))
    blocks = [block for _ in range(10) for block in [one] * 20 + [other] * 20]  # what was, comes again
    assert Demand().expect(blocks, len(blocks))[8:12].sum() > 0.9
    turns = [one, other] * 100  # what was, never comes at once
    np.testing.assert_allclose(Demand().expect(turns, 200)[[0, 8]], 0.125, atol=0.02)


@examples(50)
@given(st.lists(st.lists(st.integers(0, 7), max_size=5), min_size=1, max_size=12))
def test_batch_by_batch_and_all_at_once_are_the_same(experts: list[list[int]]) -> None:
    """Also where some were empty, and where it begins anew with other batches."""
    batches = [np.bincount(np.array(e, np.int64), minlength=8)[None].astype(np.int64) for e in experts]
    demand = Demand()
    for _ in range(2):
        for number in range(1, len(batches) + 1):
            shares = demand.expect(batches[:number], 12)
            np.testing.assert_allclose(shares, Demand().expect(batches[:number], 12))
            assert shares.min() >= 0
            assert shares.sum() == pytest.approx(1.0 if any(experts[:number]) else 0.0)
        batches = [batch + 1 for batch in batches]
        experts = [[0]] * len(experts)


@examples(200)
@given(st.data())
def test_what_is_held_needs_no_more_copies_than_there_are(data: st.DataObject) -> None:
    """Beside what was there, fetched ones among it, as many as are named; and with enough of them the likeliest."""
    n, slots = 8, data.draw(st.integers(1, 6))
    resident = np.zeros((n, 1), np.bool_)
    resident[data.draw(st.lists(st.integers(0, n - 1), max_size=slots, unique=True)), 0] = True
    fetched = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))[:, None] & ~resident
    shares = np.array(data.draw(st.lists(st.integers(1, 100), min_size=n, max_size=n, unique=True))) / 100
    home = np.ones((n, 1), np.bool_)
    copies = data.draw(st.integers(0, n))
    many = data.draw(st.sampled_from([4.0, 1e3, 1e9]))
    there = hold_expected(shares, many, resident, fetched, home, slots, np.array([0]))
    held = hold_expected(shares, many, resident, fetched, home, slots, np.array([copies]))
    assert there.sum() <= slots
    assert held.sum() <= slots
    assert not (there & ~resident & ~fetched).any()
    assert (there & fetched).sum() == min(fetched.sum(), slots)
    assert (held & ~there).sum() <= copies
    least, others = shares[held[:, 0]].min(initial=1.0), shares[~held[:, 0]]
    if copies == n:
        assert held.sum() == slots
        assert (others - least <= np.sqrt((others + least) / many)).all()
    elsewhere = hold_expected(shares, many, resident, fetched, np.zeros((n, 1), np.bool_), slots, np.array([n]))
    assert not elsewhere.any()
