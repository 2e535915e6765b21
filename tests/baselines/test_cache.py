"""Systems whose slots are a cache: LRU and decaying scores against references made by hand, misses by closed form."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.cpu_gpu_lru import CpuGpuLru
from baselines.hybrimoe import HybriMoE
from baselines.kit.cache import CachePolicy
from baselines.on_demand import OnDemand
from experiments.routing.trace_files import read_trace
from harmoeny.cost import ExpertCost
from harmoeny.placement import IntArray, Placement
from tests.harmoeny.runtime.cases import random_experts, random_tokens, start
from tests.harmoeny.test_places import end_s, machines, ranks_experts
from tests.strategies import examples, share_of

TRACE = Path(__file__).parents[2] / "results" / "traces" / "example.parquet"


def counts_of(*experts: int, num_experts: int = 8) -> IntArray:
    """One rank's batch with as many tokens for an expert as it is named."""
    return np.bincount(experts, minlength=num_experts)[None].astype(np.int64)


def held(placement: Placement) -> list[int]:
    return np.flatnonzero(placement.resident[:, 0]).tolist()


def follow(policy: CachePolicy, batches: list[IntArray], layer: int = 0) -> list[list[int]]:
    """What the only rank holds before every batch and after the last."""
    placement, history = policy.place(layer, batches[0].shape[1], 1), []
    seen = [held(placement)]
    for counts in batches:
        history.append(counts)
        placement = policy.retain(layer, history, placement) or placement
        seen.append(held(placement))
    return seen


@examples(100)
@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True), min_size=1, max_size=20),
       st.integers(1, 8))  # fmt: skip
def test_lru_is_that_of_a_list_that_moves_to_the_front(batches: list[list[int]], num_slots: int) -> None:
    """The reference touches a batch's experts from the last to the first, as all have one token."""
    policy = CpuGpuLru(num_slots=num_slots)
    order = list(range(8))  # the first ones are there at the beginning, and in this order
    expected = [sorted(order[:num_slots])]
    for batch in batches:
        for expert in sorted(batch, reverse=True):
            order.remove(expert)
            order.insert(0, expert)
        expected.append(sorted(order[:num_slots]))
    assert follow(policy, [counts_of(*batch) for batch in batches]) == expected


def recorded(layer: int) -> list[IntArray]:
    """The batches of the recorded routing, in units of as many tokens as half of the experts have at most."""
    counts = read_trace(TRACE).counts[:, layer].sum(axis=1)
    return [row[None] // int(np.median(counts)) for row in counts]


@pytest.mark.parametrize("layer", [0, 3])
def test_lru_and_decaying_scores_on_recorded_routing(layer: int) -> None:
    """LRU touches a batch's experts from the fewest tokens to the most; MRS forgets what weighs under a thousandth."""
    batches, num_slots = recorded(layer), 24
    order, lru = list(range(128)), [list(range(num_slots))]
    shares: list[dict[int, float]] = []
    kept = set(range(num_slots))
    mrs = [sorted(kept)]
    for (tokens,) in batches:
        active = sorted(np.flatnonzero(tokens).tolist(), key=lambda e: (-tokens[e], e))
        for expert in reversed(active):
            order.remove(expert)
            order.insert(0, expert)
        lru.append(sorted(order[:num_slots]))
        shares.insert(0, {e: tokens[e] / tokens.sum() for e in active[:12]})
        scores = [
            sum(0.5 ** (age + 1) * shares[age].get(e, 0.0) for age in range(len(shares[:11]))) for e in range(128)
        ]
        fetched = sorted(set(active) - kept, key=lambda e: (scores[e], e))[:num_slots]
        stay = sorted(kept, key=lambda e: (-scores[e], e))[: num_slots - len(fetched)]
        kept = {*fetched, *stay}
        mrs.append(sorted(kept))
    assert follow(CpuGpuLru(num_slots=num_slots), batches) == lru
    fast = HybriMoE(num_slots=num_slots).calibrated(ExpertCost(token_s=1.0, fetch_s=0.1, host_token_s=1e6))
    assert follow(fast, batches) == mrs
    assert len({tuple(held) for held in mrs}) > 12


def test_popular_experts_stay_in_an_lru_of_a_prefill_and_the_last_fetched_on_demand() -> None:
    prefill = counts_of(*[0] * 9, *[3] * 7, *[5] * 5, *[6] * 2, 7)
    assert follow(CpuGpuLru(num_slots=2), [prefill])[-1] == [0, 3]
    assert follow(OnDemand(num_slots=2), [prefill])[-1] == [6, 7]


def test_layers_behind_the_indexes_have_no_cache() -> None:
    policy = CpuGpuLru(num_slots=2, indexes=1)
    assert follow(policy, [counts_of(4, 5)], layer=0) == [[0, 1], [4, 5]]
    assert follow(policy, [counts_of(4, 5)], layer=1) == [[], []]
    with pytest.raises(ValueError, match="indexes: -1, must be at least 0, or null"):
        CpuGpuLru(indexes=-1).validate()


def test_scores_decay_and_only_the_best_count() -> None:
    policy = HybriMoE(decay=0.5, top_p=2)
    totals = [np.array([6, 3, 1, 0]), np.array([0, 0, 4, 4]), np.array([0, 8, 0, 0])]
    by_hand = np.zeros(4)
    for shares in ([0.6, 0.3, 0, 0], [0, 0, 0.5, 0.5], [0, 1.0, 0, 0]):
        by_hand = 0.5 * np.array(shares) + 0.5 * by_hand
    np.testing.assert_allclose(policy.scores(totals), by_hand)
    for options in ({"decay": 0.0}, {"decay": 1.5}, {"top_p": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: .*, must be "):
            HybriMoE(**options).validate()


def test_hybrimoe_keeps_the_highest_scores_of_what_it_held_and_fetched() -> None:
    """The link is fast, the host slow: everything is fetched."""
    policy = HybriMoE(num_slots=2).calibrated(ExpertCost(token_s=1.0, fetch_s=0.1, host_token_s=1e6))
    assert follow(policy, [counts_of(2, 2, 3), counts_of(3, 4, 4), counts_of(0)]) == [[0, 1], [2, 3], [3, 4], [0, 4]]
    slow = HybriMoE(num_slots=2).calibrated(ExpertCost(token_s=1.0, fetch_s=1e6, host_token_s=1.0))
    assert follow(slow, [counts_of(2, 2, 3), counts_of(3, 4, 4)]) == [[0, 1]] * 3


@examples(300)
@given(experts=ranks_experts(6), cost=machines())
def test_hybrimoes_schedule_is_never_better_than_exhaustive_search(
    experts: list[tuple[int, bool]], cost: ExpertCost
) -> None:
    policy = HybriMoE(num_slots=1).calibrated(cost)
    executed = np.array([[n] for n, _ in experts])
    placement = Placement(np.zeros(len(experts), np.int64), np.array([[h] for _, h in experts]))
    host = tuple(policy.on_host(executed, placement)[:, 0].tolist())
    times = {other: end_s(experts, other, cost) for other in product((False, True), repeat=len(experts))}
    assert times[host] >= min(times.values())
    # It takes whole experts from both ends: no worse than all on the host, or all on the device, by more than one.
    largest = max(cost.host_s([n]) for n, _ in experts)
    assert times[host] <= min(times[(True,) * len(experts)], times[(False,) * len(experts)]) + largest


def test_hybrimoe_by_hand() -> None:
    """Two held experts of 8 and 2 tokens, three others of 6, 4 and 1; a fetch takes 5, a token 1 here and 2 there.

    Device: 8 until 8; the host takes 1 (2 s) before, then 4 (10 s), then the device 2 (until 10) and 6, there at 5.
    """
    policy = HybriMoE().calibrated(ExpertCost(token_s=1.0, fetch_s=5.0, host_token_s=2.0))
    placement = Placement(np.zeros(5, np.int64), np.array([[True], [True], [False], [False], [False]]))
    assert policy.on_host(np.array([[8], [2], [6], [4], [1]]), placement)[:, 0].tolist() == [
        False, False, False, True, True,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="must be calibrated"):
        HybriMoE().on_host(np.array([[8], [2], [6], [4], [1]]), placement)


def test_misses_of_a_cache_of_random_experts_are_those_of_the_closed_form() -> None:
    """Huang et al.: of a token's two experts, one at least is there, and both are, with these probabilities.

    ``1 - (n-M)/n * (n-M-1)/(n-1)`` and ``M/n * (M-1)/(n-1)``; counted by the runtime, over 3,000 tokens one by one.
    """
    n, m, num_tokens = 8, 3, share_of(3000)
    engine = start([random_experts(n, 0, hidden_size=4, width=4)], host_threads=1, cost=ExpertCost(1e-5, 5e-5))
    policy = CpuGpuLru(num_slots=m, indexes=None)
    policy.retain = lambda *_: None  # type: ignore[method-assign]  # the same ones all the time
    engine.use(engine.build_system("x", policy))
    rng, tokens = np.random.default_rng(0), random_tokens(0, 1, n, 2, hidden_size=4)
    engine.recorder.begin_iteration()
    for _ in range(num_tokens):
        tokens.ids[0] = tokens.ids.new_tensor(rng.permutation(n)[:2])
        engine.recorder.begin_layer(0)
        engine.forward(0, tokens.hidden, tokens.ids, tokens.weights)
    misses = np.array([times.marks.fetch.num_misses for times in engine.recorder.collect()])
    engine.close()
    some, both = 1 - (n - m) / n * (n - m - 1) / (n - 1), m / n * (m - 1) / (n - 1)
    for share, probability in (((misses < 2).mean(), some), ((misses == 0).mean(), both)):
        assert abs(share - probability) < 4 * (probability * (1 - probability) / num_tokens) ** 0.5


@pytest.mark.parametrize("policy", [OnDemand(num_slots=2), CpuGpuLru(num_slots=2)])
def test_what_is_kept_is_copied_once_and_hits_from_then_on(policy: CachePolicy) -> None:
    engine = start([random_experts(6, 1)], host_threads=1)
    engine.use(engine.build_system("x", policy))
    tokens = random_tokens(3, 5, 6, 2)
    tokens.ids[:] = tokens.ids.new_tensor([4, 5])
    engine.recorder.begin_iteration()
    for _ in range(3):
        engine.recorder.begin_layer(0)
        engine.forward(0, tokens.hidden, tokens.ids, tokens.weights)
        engine.finish()
    marks = [times.marks for times in engine.recorder.collect()]
    engine.close()
    assert [m.fetch.num_misses for m in marks] == [2, 0, 0]
    assert [m.fetch.num_host_fetches for m in marks] == [2, 0, 0]
    assert [m.host.num_tokens for m in marks] == [10 if policy.needs_host else 0, 0, 0]
    assert [len(m.fetch.restores) for m in marks] == [0, 0, 0]
