"""Caches that look ahead: what they copy in is what follows where something does; gains against exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.hybrimoe import HybriMoE, prefetched, take_from_both_ends
from baselines.kit.ahead import PrefetchingCache
from baselines.pregated import PreGated
from harmoeny.cost import ExpertCost
from harmoeny.placement import IntArray, Placement
from harmoeny.places import PlaceCosts
from harmoeny.trace import RoutingTrace
from tests.harmoeny.runtime.cases import expected_output, random_experts, random_tokens, start
from tests.harmoeny.test_places import end_s, machines, ranks_experts
from tests.strategies import examples

NUM_EXPERTS, NUM_LAYERS = 8, 3
COST = ExpertCost(token_s=1.0, fetch_s=0.5, host_token_s=1e3)  # nothing is left to the host


def chained(num_tokens: int = 200) -> RoutingTrace:
    """Tokens have two experts, and in every layer those that follow theirs: 0 and 1 lead to 3 and 4."""
    first = np.random.default_rng(0).random((num_tokens, NUM_EXPERTS)).argsort(axis=1)[:, :2]
    return RoutingTrace([(first + 3 * layer) % NUM_EXPERTS for layer in range(NUM_LAYERS)], [0] * NUM_LAYERS)


def counts_of(*experts: int) -> IntArray:
    return np.bincount(experts, minlength=NUM_EXPERTS)[None].astype(np.int64)


def looks_ahead(policy: PrefetchingCache, counts: IntArray, layer: int = 0) -> list[int]:
    following = policy.place(layer + 1, NUM_EXPERTS, 1)
    ahead = policy.look_ahead(layer, counts, following) or following
    assert ahead.resident.sum() <= (policy.num_slots or NUM_EXPERTS)
    return np.flatnonzero(ahead.resident[:, 0]).tolist()


def test_what_follows_is_copied_in_and_what_is_there_stays_where_there_is_room() -> None:
    policy = PreGated(num_slots=3).fitted(chained(), NUM_EXPERTS, 1)
    assert policy.fit_report()["predicted_experts"] == 1.0
    assert looks_ahead(policy, counts_of(0, 1, 1)) == [0, 3, 4]
    assert looks_ahead(policy, counts_of(1, 1, 3, 3, 4)) == [4, 6, 7]
    assert looks_ahead(policy, counts_of()) == [0, 1, 2]
    assert looks_ahead(policy, counts_of(5, 6)) == [0, 1, 2]  # 8 and 9, which are 0 and 1
    assert looks_ahead(policy, counts_of(0, 1), layer=NUM_LAYERS - 1) == [0, 1, 2]


def test_hybrimoe_copies_in_what_follows_for_as_long_as_that_gains() -> None:
    """Of 4 and 3, with 2 tokens and 1, the second would be fetched in time behind the first."""
    policy = HybriMoE(num_slots=3).calibrated(COST).fitted(chained(), NUM_EXPERTS, 1)
    assert looks_ahead(policy, counts_of(0, 1, 1)) == [1, 2, 4]
    assert looks_ahead(policy, counts_of()) == looks_ahead(policy, counts_of(0), layer=NUM_LAYERS - 1) == [0, 1, 2]


def test_only_the_likeliest_are_copied_in_where_there_are_more_than_slots() -> None:
    policy = PreGated(num_slots=2).fitted(chained(), NUM_EXPERTS, 1)
    assert looks_ahead(policy, counts_of(0, 1, 1, 2, 2, 2)) == [4, 5]


def test_where_nothing_follows_from_anything_the_report_says_so() -> None:
    rng = np.random.default_rng(1)
    ids = [rng.random((400, NUM_EXPERTS)).argsort(axis=1)[:, :2] for _ in range(NUM_LAYERS)]
    policy = PreGated(num_slots=2).fitted(RoutingTrace(ids, [0] * NUM_LAYERS), NUM_EXPERTS, 1)
    assert policy.fit_report()["predicted_experts"] < 0.4  # by chance: 2 of 8
    assert PreGated(num_slots=2).calibration_batches == HybriMoE().calibration_batches == 4
    assert HybriMoE(prefetch=False).calibration_batches == 0


def test_without_prefetch_hybrimoe_copies_nothing_ahead() -> None:
    policy = HybriMoE(num_slots=3, prefetch=False).calibrated(COST).fitted(chained(), NUM_EXPERTS, 1)
    assert looks_ahead(policy, counts_of(0, 1)) == [0, 1, 2]


@examples(200)
@given(experts=ranks_experts(6), cost=machines(), data=st.data())
def test_one_prefetch_is_that_with_the_soonest_end(
    experts: list[tuple[int, bool]], cost: ExpertCost, data: st.DataObject
) -> None:
    """The link has time for one; the reference plays the three timelines of every choice."""
    executed = np.array([[n] for n, _ in experts])
    resident = np.array([[h] for _, h in experts])
    costs = PlaceCosts.of(cost)
    one = np.zeros(len(experts), np.int64)
    one[0] = int(np.ceil((cost.fetch_s - cost.launch_s) / cost.token_s))
    tokens = data.draw(st.sampled_from([one, np.zeros_like(one)]))
    slice_s = cost.launch_s + max(one[0] * cost.token_s, cost.weights_s)
    most = int(slice_s / cost.fetch_s) if tokens.any() and one[0] > 0 else 0
    scores, slots = np.zeros(len(experts)), len(experts)

    def simulated_s(held: np.ndarray) -> float:
        host = take_from_both_ends(executed, held, costs)[:, 0]
        in_order = sorted(
            zip(executed[:, 0].tolist(), held[:, 0].tolist(), host.tolist(), strict=True), key=lambda e: -e[0]
        )
        return end_s([(n, h) for n, h, _ in in_order], tuple(on_host for _, _, on_host in in_order), cost)

    held = prefetched(executed, scores, resident, slots, slots, tokens, costs)
    assert (held >= resident).all()
    assert (held & ~resident).sum() <= most
    assert simulated_s(held) <= simulated_s(resident) * (1 + 1e-9)
    if most == 1:
        tried = [simulated_s(resident | np.eye(slots, dtype=bool)[:, [e]]) for e in range(slots)]
        assert simulated_s(held) == pytest.approx(min(*tried, simulated_s(resident)))


def test_a_prefetch_overwrites_the_least_score_of_what_is_not_needed() -> None:
    executed = np.array([[3], [0], [0], [5]])
    resident = np.array([[True], [True], [True], [False]])
    scores = np.array([0.0, 0.3, 0.2, 0.0])
    costs = PlaceCosts.of(ExpertCost(token_s=1.0, fetch_s=4.0, host_token_s=1e3))
    held = prefetched(executed, scores, resident, 3, 12, np.array([4, 0, 0, 0]), costs)
    assert held[:, 0].tolist() == [True, True, False, True]
    needed = np.array([[3], [2], [2], [5]])
    assert (prefetched(needed, scores, resident, 3, 12, np.array([4, 0, 0, 0]), costs) == resident).all()


def test_ranks_prefetch_their_own_experts() -> None:
    policy = PreGated(num_slots=1, placement="round_robin").fitted(chained(), NUM_EXPERTS, 2)
    following = policy.place(1, NUM_EXPERTS, 2)
    ahead = policy.look_ahead(0, np.repeat(counts_of(0, 1), 2, axis=0), following)
    assert isinstance(ahead, Placement)
    assert np.argwhere(ahead.resident).tolist() == [[3, 1], [4, 0]]


def test_where_experts_follow_from_those_before_only_the_first_layer_is_fetched_on_demand() -> None:
    trace = chained(12)
    layers = [random_experts(NUM_EXPERTS, layer, hidden_size=4, width=4) for layer in range(NUM_LAYERS)]
    engine = start(layers, cost=ExpertCost(1e-5, 5e-5))
    policy = PreGated(num_slots=2).calibrated(engine.memory.cost).fitted(chained(), NUM_EXPERTS, 1)
    engine.use(engine.build_system("x", policy))
    misses = np.zeros(NUM_LAYERS, np.int64)
    for token in range(12):
        engine.recorder.begin_iteration()
        for layer in range(NUM_LAYERS):
            tokens = random_tokens(token, 1, NUM_EXPERTS, 2, hidden_size=4)
            tokens.ids[0] = torch.from_numpy(trace.expert_ids[layer][token])
            engine.recorder.begin_layer(layer)
            output = engine.forward(layer, tokens.hidden, tokens.ids, tokens.weights)
            kept = torch.ones_like(tokens.ids, dtype=torch.bool)
            expected = expected_output(layers[layer], tokens.hidden, tokens.ids, tokens.weights, kept)
            torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
        engine.finish()
        misses += [times.marks.fetch.num_misses for times in engine.recorder.collect()]
    engine.close()
    assert misses[0] > 0
    assert misses[1:].tolist() == [0, 0]
