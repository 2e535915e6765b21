"""The layer against one expert at a time, for every fetch strategy, on ranks that are threads."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baselines.drop import Drop
from harmoeny.choices import Fetch, Knowledge
from harmoeny.cost import ExpertCost
from harmoeny.head_start import HeadStart
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan, plan_from_tokens
from harmoeny.policy import Policy
from harmoeny.rebalance import TokenHarMoEny
from harmoeny.runtime.layer.recorder import Phase
from tests.harmoeny.runtime.cases import (
    COST,
    TOLERANCE,
    RandomPlan,
    Shuffled,
    Tokens,
    expected_output,
    random_experts,
    random_tokens,
    start,
)
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads
from tests.strategies import examples

head_starts = st.builds(
    HeadStart,
    most_rows=st.integers(1, 20),
    slice_rows=st.sampled_from([0, 2]),
    least_rows=st.integers(1, 4),
    tile_rows=st.sampled_from([1, 2]),
    batch_rows=st.sampled_from([12, 1000]),
)


def run_layers(
    world_size: int, policy: Policy, tokens: list[list[Tokens]], *, num_experts: int, batches: int = 1,
    kernel: str = "auto", exchange: str = "collective", cost: ExpertCost = COST, **experts: Any,
) -> list[list[Any]]:  # fmt: skip
    """Execute layers ``tokens[layer][rank]`` and compare every rank's output; returns the records by rank."""
    layers = [random_experts(num_experts, seed=layer, **experts) for layer in range(len(tokens))]

    def rank_main(comm: ThreadCommunicator) -> list[Any]:
        engine = start(layers, comm, exchange=exchange, kernel=kernel, cost=cost)
        assert engine.comm.exchange == (exchange if world_size > 1 else "collective")
        system = engine.build_system("x", policy)
        for _ in range(batches):
            engine.use(system)
            engine.recorder.begin_iteration()
            for layer, by_rank in enumerate(tokens):
                t = by_rank[comm.rank]
                engine.recorder.begin_layer(layer)
                with engine.executed_masks() as masks:
                    output = engine.forward(layer, t.hidden, t.ids, t.weights)
                (kept,) = masks
                expected = expected_output(layers[layer], t.hidden, t.ids, t.weights, kept)
                if policy.exact and not getattr(policy, "drop", False):
                    assert torch.equal(kept, t.ids >= 0)
                marks = engine.recorder._layers[-1]
                if marks.plan is not None:
                    # No assignment is executed twice.
                    early = 0 if marks.plan.early is None else marks.plan.early[comm.rank].sum()
                    assert int(kept.sum()) == marks.plan.tokens[comm.rank].sum() + early
                    assert marks.num_assignments == int((t.ids >= 0).sum())
                if output.numel():
                    error = (output.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
                    assert error <= TOLERANCE[output.dtype]
            engine.finish()
        engine.close()
        return engine.recorder.collect()

    return run_threads(world_size, rank_main)


@examples(120)
@given(data=st.data())
def test_every_strategy_slot_count_top_k_and_dtype_is_exact(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 5))
    num_experts = data.draw(st.integers(1, 9))
    fetch = data.draw(st.sampled_from(Fetch))
    slots = None if fetch == "none" else data.draw(st.none() | st.integers(1, num_experts))
    top_k = data.draw(st.integers(1, min(3, num_experts)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    layout: dict[str, Any] = {"gated": data.draw(st.booleans()), "bias": data.draw(st.booleans()), "width": 16}
    seed = data.draw(st.integers(0, 10**6))
    drop = data.draw(st.booleans())
    counts = [[data.draw(st.sampled_from([0, 1, 5, 16])) for _ in range(world_size)] for _ in range(2)]
    tokens = [
        [
            random_tokens(seed + 17 * i + 100 * j, n, num_experts, top_k, dtype=dtype, masked=0.1)
            for i, n in enumerate(c)
        ]
        for j, c in enumerate(counts)
    ]
    early = None if slots is not None else data.draw(st.none() | head_starts)
    policy = RandomPlan(seed, drop=drop, fetch=fetch, num_slots=slots, early=early)
    layout["exchange"] = data.draw(st.sampled_from(["collective", "put"]))
    kernel = data.draw(st.sampled_from(["loop", "grouped_mm"]))
    run_layers(world_size, policy, tokens, num_experts=num_experts, batches=2, kernel=kernel, dtype=dtype, **layout)


@pytest.mark.parametrize("world_size", [1, 3, 8])
@pytest.mark.parametrize("fetch", Fetch)
def test_harmoeny_is_exact_when_all_tokens_want_one_expert(world_size: int, fetch: str) -> None:
    def all_to_one(rank: int) -> Tokens:
        t = random_tokens(rank, 12, 8, 1)
        return Tokens(t.hidden, torch.full_like(t.ids, 3), t.weights)

    tokens = [[all_to_one(r) for r in range(world_size)]]
    records = run_layers(world_size, TokenHarMoEny(threshold=1, fetch=fetch), tokens, num_experts=8)
    loads = [int(record[0].marks.plan.tokens[:, :, rank].sum()) for rank, record in enumerate(records)]
    assert loads == [12] * world_size
    fetched = sum(r[0].marks.fetch.num_host_fetches + r[0].marks.fetch.num_peer_fetches for r in records)
    assert fetched == (0 if fetch == "none" else world_size - 1)


def test_an_empty_batch_and_ranks_without_tokens() -> None:
    empty = [[random_tokens(0, 0, 4, 2) for _ in range(3)]]
    run_layers(3, TokenHarMoEny(threshold=1), empty, num_experts=4)
    one = [[random_tokens(1, 9 if rank == 2 else 0, 4, 2) for rank in range(3)]]
    run_layers(3, TokenHarMoEny(threshold=1), one, num_experts=4)
    run_layers(3, Drop(), one, num_experts=4)


def test_more_ranks_than_experts() -> None:
    tokens = [[random_tokens(r, 10, 3, 2) for r in range(7)]]
    run_layers(7, TokenHarMoEny(threshold=1), tokens, num_experts=3)


def test_records_name_the_source_of_every_fetch_and_phases_follow_each_other() -> None:
    tokens = [[random_tokens(r, 16, 6, 2) for r in range(3)] for _ in range(2)]
    for fetch, peer in (("async", False), ("sync", False), ("peer", True)):
        records = run_layers(3, RandomPlan(5, fetch=fetch), tokens, num_experts=6)
        for rank, layers in enumerate(records):
            for times in layers:
                stats, plan = times.marks.fetch, times.marks.plan
                wanted = int(plan.fetch[:, rank].sum())
                from_peer = int((plan.fetch & plan.from_peer)[:, rank].sum()) if peer else 0
                assert (stats.num_peer_fetches, stats.num_host_fetches) == (from_peer, wanted - from_peer)
                assert stats.num_halved_fetches == (int(plan.halved[:, rank].sum()) if peer else 0)
                # Two matrices of 8 x 12 numbers of 4 bytes.
                assert stats.fetch_bytes == wanted * 2 * 8 * 12 * 4
                assert times.boundary_s == sorted(times.boundary_s)
                assert times.fetch_wait_s <= times.phase_s(Phase.COMPUTE) + times.phase_s(Phase.PLAN)
                assert (times.fetch_s > 0) == (wanted > 0)


def test_a_recorder_that_is_off_takes_no_marks() -> None:
    def rank_main(comm: ThreadCommunicator) -> int:
        engine = start([random_experts(2, 0)], comm, record=False)
        engine.use(engine.build_system("x", TokenHarMoEny(threshold=1)))
        t = random_tokens(0, 4, 2, 1)
        engine.recorder.begin_iteration()
        engine.recorder.begin_layer(0)
        engine.forward(0, t.hidden, t.ids, t.weights)
        return len(engine.recorder.collect())

    assert run_threads(1, rank_main) == [0]


def test_a_layer_without_a_system_is_refused() -> None:
    def rank_main(comm: ThreadCommunicator) -> None:
        engine = start([random_experts(2, 0)], comm)
        t = random_tokens(0, 4, 2, 1)
        with pytest.raises(RuntimeError, match="no system selected"):
            engine.forward(0, t.hidden, t.ids, t.weights)

    run_threads(1, rank_main)


class Wandering(RandomPlan):
    """Every batch, all experts move to the next rank; the plan stays what it was."""

    description: ClassVar[str] = "placements that move on"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.HISTORY, Knowledge.EXACT})

    def update_placement(self, layer: int, history: Any, placement: Placement) -> Placement:  # noqa: ARG002
        return Placement.from_home((placement.home + 1) % placement.world_size, placement.world_size)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Send all tokens to the last rank."""
        tokens = np.zeros((*counts.shape, len(counts)), dtype=np.int64)
        tokens[:, :, -1] = counts
        return plan_from_tokens(tokens, placement)


def test_weights_come_from_the_homes_of_the_present_placement() -> None:
    """An expert that has left a rank can be fetched back there: its first home would send it to itself."""
    tokens = [[random_tokens(3 + rank, 20, 6, 2) for rank in range(3)]]
    records = run_layers(3, Wandering(0, fetch="peer", num_slots=1), tokens, num_experts=6, batches=5)
    assert records[2][-1].marks.fetch.num_peer_fetches > 0


@examples(40)
@given(data=st.data())
def test_new_residents_from_peers_and_the_host_are_the_right_ones(data: st.DataObject) -> None:
    world_size, num_experts = data.draw(st.integers(2, 4)), data.draw(st.integers(2, 8))
    seed, slots = data.draw(st.integers(0, 10**6)), data.draw(st.none() | st.integers(1, num_experts))
    tokens = [
        [random_tokens(seed + rank + 9 * layer, 12, num_experts, 2) for rank in range(world_size)] for layer in (0, 1)
    ]
    policy = Shuffled(seed, fetch="peer", num_slots=slots)
    cost = ExpertCost(token_s=1e-5, fetch_s=5e-5, peer_fetch_s=data.draw(st.sampled_from([1e-5, 4e-5])))
    exchange = data.draw(st.sampled_from(["collective", "put"]))
    kernel = data.draw(st.sampled_from(["loop", "grouped_mm"]))
    run_layers(
        world_size, policy, tokens, num_experts=num_experts, batches=4, cost=cost, exchange=exchange, kernel=kernel
    )
