"""Layers of which a part is executed before the plan is known: exact, with everything in the records, in any way."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoeny.choices import Fetch, Knowledge
from harmoeny.cost import ExpertCost
from harmoeny.head_start import HeadStart, early_rows
from harmoeny.placement import IntArray, Placement, place
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.runtime.exchange import fused
from harmoeny.runtime.exchange.early import choose_early, number_assignments
from harmoeny.runtime.layer.head_start import HeadStarts
from harmoeny.runtime.memory.slots import Slot
from harmoeny.runtime.memory.transfer import ThreadTransfers
from harmoeny.timed import HarMoEny
from tests.harmoeny.runtime.cases import (
    COST,
    RandomPlan,
    Shuffled,
    Tokens,
    expected_output,
    random_experts,
    random_tokens,
    start,
)
from tests.harmoeny.runtime.layer.test_engine import run_layers
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads
from tests.harmoeny.test_head_start import head_starts
from tests.strategies import examples

#: With it, two hot experts of a rank are begun.
SOME = HeadStart(most_rows=12, slice_rows=1, least_rows=2, tile_rows=2, batch_rows=1000)
KERNELS, EXCHANGES = ["loop", "grouped_mm"], ["collective", "put"]


@examples(200)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.booleans()), min_size=1, max_size=40),
    head_starts,
    st.integers(0, 2**32 - 1),
)
def test_a_device_chooses_what_a_host_does(experts: list[tuple[int, bool]], head_start: HeadStart, seed: int) -> None:
    counts, resident = (np.array(column) for column in zip(*experts, strict=True))
    wanted = early_rows(counts[None], np.ascontiguousarray(resident[:, None]), head_start)[0]
    found = choose_early(torch.from_numpy(counts), torch.from_numpy(resident), head_start)
    assert found.tolist() == wanted.tolist()
    ids = np.random.default_rng(seed).integers(-1, len(experts), (len(experts), 3))
    seen = dict.fromkeys(range(-1, len(experts)), 0)
    for expert, number in zip(ids.flatten().tolist(), number_assignments(torch.from_numpy(ids)).flatten(), strict=True):
        assert number == seen[expert]
        seen[expert] += 1


def skewed(seed: int, num_experts: int, layers: int, world_size: int) -> list[list[Tokens]]:
    """Tokens of which most want the experts of their own rank first, so that much of them can be begun."""

    def of(rank: int, layer: int) -> Tokens:
        t = random_tokens(seed + rank + 10 * layer, 24, num_experts, 2, masked=0.1)
        rng = np.random.default_rng(seed + rank)
        first = rng.choice(num_experts, p=rng.dirichlet(np.full(num_experts, 0.3)), size=24)
        ids = torch.from_numpy(np.stack([first, (first + 1) % num_experts], axis=1))
        return Tokens(t.hidden, ids.masked_fill(t.ids < 0, -1), t.weights)

    return [[of(rank, layer) for rank in range(world_size)] for layer in range(layers)]


@pytest.mark.many
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("fetch", Fetch)
def test_early_rows_are_exact_and_recorded_with_every_strategy(kernel: str, exchange: str, fetch: str) -> None:
    records = run_layers(
        3, RandomPlan(7, fetch=fetch, early=SOME), skewed(3, 6, 2, 3), num_experts=6, batches=3, kernel=kernel,
        exchange=exchange, width=16,
    )  # fmt: skip
    plans = [[times.marks.plan for times in of_rank] for of_rank in records]
    for by_rank in zip(*plans, strict=True):
        early = by_rank[0].early
        assert early is not None
        assert early.any()
        if fetch != "none":
            assert not early[~place("contiguous", 6, 3).resident.T].any()
        assert (early.sum(axis=1) <= SOME.most_rows).all()
        for plan in by_rank:
            np.testing.assert_array_equal(plan.early, early)


class Dropping(RandomPlan):
    """Is asked for a plan even where there is nothing to decide."""

    exact: ClassVar[bool] = False


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which is not installed")
@pytest.mark.parametrize("kernel", ["triton", "loop"])
def test_fused_passes_do_the_same(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "is_available", lambda _: True)
    policy = Dropping(7, drop=False, early=SOME)
    records = run_layers(1, policy, skewed(3, 6, 2, 1), num_experts=6, batches=2, kernel=kernel, width=16)
    assert records[0][0].marks.plan.early.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_shared_experts_are_executed_with_the_rest(kernel: str) -> None:
    experts = replace(random_experts(7, 0, width=16), num_shared=1)

    def rank_main(comm: ThreadCommunicator) -> IntArray:
        t = skewed(3, 6, 1, 2)[0][comm.rank]
        engine = start([experts], comm, kernel=kernel)
        engine.use(engine.build_system("x", RandomPlan(7, early=SOME)))
        engine.recorder.begin_iteration()
        engine.recorder.begin_layer(0)
        shared = torch.rand(len(t.hidden))
        output = engine.forward(0, t.hidden, t.ids, t.weights, shared)
        ids = torch.cat([t.ids, torch.full_like(t.ids[:, :1], 6)], dim=1)
        weights = torch.cat([t.weights, shared[:, None]], dim=1)
        wanted = expected_output(experts, t.hidden, ids, weights, ids >= 0)
        torch.testing.assert_close(output.double(), wanted, rtol=1e-4, atol=1e-4)
        plan = engine.recorder._layers[-1].plan
        engine.close()
        assert plan is not None
        assert plan.early is not None
        return plan.early

    early, _ = run_threads(2, rank_main)
    assert early.any()
    assert not early[:, -1].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_residents_that_change_for_a_batch_are_read_before(kernel: str) -> None:
    policy = Shuffled(5, fetch="peer", num_slots=8, early=SOME)
    run_layers(3, policy, skewed(5, 8, 2, 3), num_experts=8, batches=5, kernel=kernel, width=16)


class MovesAhead(RandomPlan):
    """While a layer is executed, all experts of the next move to the next rank."""

    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.LOOKAHEAD, Knowledge.EXACT})

    def look_ahead(self, layer: int, counts: IntArray, following: Placement) -> Placement:  # noqa: ARG002
        return Placement.from_home((following.home + 1) % following.world_size, following.world_size)


@pytest.mark.parametrize("kernel", KERNELS)
def test_residents_that_are_on_their_way_are_waited_for(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    move = ThreadTransfers.move

    def slowly(self: ThreadTransfers, slot: Slot, source: Mapping[str, Tensor]) -> None:
        time.sleep(5e-3)
        move(self, slot, source)

    monkeypatch.setattr(ThreadTransfers, "move", slowly)
    records = run_layers(
        2, MovesAhead(5, early=SOME), skewed(5, 6, 3, 2), num_experts=6, batches=3, kernel=kernel, width=16
    )
    waits = [
        times.marks.fetch.fetch_waits + times.marks.fetch.restore_waits for of_rank in records for times in of_rank
    ]
    assert any(waits), "the layer counts the stall"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("num_stages", [None, 3])
def test_harmoeny_is_exact_with_a_head_start_in_stages_or_not(kernel: str, num_stages: int | None) -> None:
    cost = replace(COST, exchange_latency_s=1e-4, exchange_token_s=1e-5, grouped=kernel != "loop", launch_s=1e-6)

    def harmoeny(head_start: bool) -> Policy:
        return HarMoEny(head_start=head_start, num_stages=num_stages, spare_slots=1, interval=1).calibrated(cost)

    tokens = skewed(8, 8, 2, 2)
    plans: dict[bool, list[Plan]] = {}
    for head_start in (True, False):
        records = run_layers(2, harmoeny(head_start), tokens, num_experts=8, batches=4, kernel=kernel, width=16)
        plans[head_start] = [times.marks.plan for times in records[0]]
    assert any(plan.early is not None for plan in plans[True])
    assert all(plan.early is None for plan in plans[False])
    for begun, whole in zip(plans[True], plans[False], strict=True):
        early = 0 if begun.early is None else begun.early
        np.testing.assert_array_equal(begun.tokens.sum(axis=2) + early, whole.tokens.sum(axis=2))


@pytest.mark.parametrize("kernel", KERNELS)
def test_at_decode_sizes_no_layer_is_begun(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rank has as many tokens as an expert would need of them, so that nothing is even looked at."""

    def refuse(*_: object) -> None:
        raise AssertionError("it looked at assignments")

    monkeypatch.setattr(HeadStarts, "_execute", refuse)
    monkeypatch.setattr(HeadStarts, "_queue", refuse)
    policy = RandomPlan(7, early=SOME._replace(least_rows=25))
    records = run_layers(2, policy, skewed(3, 6, 1, 2), num_experts=6, kernel=kernel, width=16)
    assert all(times.marks.plan.early is None for of_rank in records for times in of_rank)


def test_costs_that_are_not_known_begin_nothing() -> None:
    assert HarMoEny().begin_early(place("contiguous", 8, 2)) is None
    assert HarMoEny().calibrated(ExpertCost(1e-6, 1e-4)).begin_early(place("contiguous", 8, 2)) is None
