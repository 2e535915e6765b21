"""The exchange in stages, on ranks that are threads: exact for any plan, and it really overlaps."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baselines.even_split import EvenSplit
from baselines.fastermoe import FasterMoE
from baselines.llep import LLEP
from baselines.static_ep import StaticEP
from harmoeny.choices import Fetch, Knowledge
from harmoeny.cost import ExpertCost
from harmoeny.lines import Stages, stages_of_experts
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.rebalance import TokenHarMoEny
from harmoeny.runtime.exchange.comm import PeerCopies
from harmoeny.runtime.exchange.gather import Gathering, weighted_sum
from harmoeny.runtime.exchange.order import Sent
from harmoeny.runtime.layer import staged
from tests.harmoeny.runtime.cases import RandomPlan, random_experts, random_tokens, start
from tests.harmoeny.runtime.layer.test_engine import run_layers
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads
from tests.strategies import examples


def any_stages(plan: Plan, num_stages: int, seed: int) -> Stages:
    """Return stages of a plan: experts lie in any order, and are cut anywhere."""
    rng, executed = np.random.default_rng(seed), plan.executed()
    order = rng.permuted(np.tile(np.arange(plan.num_experts)[:, None], plan.world_size), axis=0)
    begins = stages_of_experts(order, executed).begins
    cuts = np.sort(rng.integers(0, plan.load() + 1, (num_stages - 1, plan.world_size)), axis=0)
    return Stages(
        begins, np.concatenate([np.zeros_like(cuts[:1], shape=(1, plan.world_size)), cuts, plan.load()[None]])
    )


class StagedRandomPlan(RandomPlan):
    """Any plan, with groups of consecutive ranks, or as many stages, cut anywhere."""

    def __init__(self, seed: int, group_size: int, *, in_lines: bool, **options: Any) -> None:
        super().__init__(seed, **options)
        self.group_size, self.in_lines = group_size, in_lines

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        if self.in_lines:
            plan = super().plan(counts, placement)
            return replace(plan, stages=any_stages(plan, self.group_size, int(counts.sum())))
        ranks = range(len(counts))
        groups = [ranks[first : first + self.group_size] for first in ranks[:: self.group_size]]
        return replace(super().plan(counts, placement), source_groups=groups)


@examples(60)
@given(data=st.data())
def test_any_plan_is_exact(data: st.DataObject) -> None:
    world_size = data.draw(st.integers(1, 6))
    num_experts = data.draw(st.integers(1, 7))
    fetch = data.draw(st.sampled_from(Fetch))
    slots = None if fetch == "none" else data.draw(st.none() | st.integers(1, num_experts))
    seed, top_k = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, min(3, num_experts)))
    counts = [[data.draw(st.sampled_from([0, 1, 5, 16])) for _ in range(world_size)] for _ in range(2)]
    tokens = [
        [random_tokens(seed + 17 * i + 100 * j, n, num_experts, top_k, masked=0.1) for i, n in enumerate(c)]
        for j, c in enumerate(counts)
    ]
    policy = StagedRandomPlan(
        seed, data.draw(st.integers(1, 7)), in_lines=data.draw(st.booleans()), drop=data.draw(st.booleans()),
        fetch=fetch, num_slots=slots,
    )  # fmt: skip
    kernel = data.draw(st.sampled_from(["loop", "grouped_mm"]))
    exchange = data.draw(st.sampled_from(["collective", "put"]))
    run_layers(world_size, policy, tokens, num_experts=num_experts, batches=2, kernel=kernel, exchange=exchange)


@pytest.mark.parametrize(
    "policy",
    [StaticEP(num_stages=3), TokenHarMoEny(threshold=1, num_stages=2), LLEP(num_stages=4), EvenSplit(num_stages=2)],
)
def test_plans_of_any_system_are_exact_in_stages(policy: Policy) -> None:
    tokens = [[random_tokens(100 * layer + rank, 40, 9, 2) for rank in range(3)] for layer in range(2)]
    run_layers(
        3,
        policy.calibrated(ExpertCost(1e-6, 1e-5, exchange_token_s=1e-6)),
        tokens,
        num_experts=9,
        batches=2,
        kernel="grouped_mm",
    )


class GatedCommunicator(ThreadCommunicator):
    """Rank 1 sends rank 0 nothing before ``gate`` opens; it says when rank 0 starts to send results back."""

    gate: threading.Event
    opens_on_call: int | None = None

    def copy_between_peers(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> PeerCopies:
        self.calls = getattr(self, "calls", 0) + 1
        if self.rank == 0 and self.calls == self.opens_on_call:
            self.gate.set()
        if self.rank == 1 and any(dst == 0 for _, dst in sends):
            assert self.gate.wait(10), "rank 0 waits for all tokens before it does anything with the first"
        return super().copy_between_peers(sends, receives)


@pytest.mark.parametrize("opened_by", ["its own tokens", "results of the first step"])
def test_tokens_that_are_there_are_executed_and_returned_while_others_are_on_their_way(opened_by: str) -> None:
    world_size, num_experts = 3, 3
    layer = random_experts(num_experts, 0)
    gate = threading.Event()
    executed_before_the_gate: list[int] = []

    def rank_main(comm: ThreadCommunicator) -> None:
        gated = GatedCommunicator(comm.world, comm.rank)
        gated.gate = gate
        if opened_by == "results of the first step":
            # The exchanges: in the own group (nothing), from rank 2, from rank 1; then results in the same order.
            gated.opens_on_call = 5

        def function(weights: Mapping[str, Tensor], rows: Tensor, out: Tensor) -> None:
            if comm.rank == 0 and not gate.is_set():
                executed_before_the_gate.append(len(rows))
                if opened_by == "its own tokens":
                    gate.set()
            layer.function(weights, rows, out)

        engine = start([replace(layer, function=function)], gated, record=False)
        engine.use(engine.build_system("x", FasterMoE(shadowing=False, fetch="async")))
        ids = torch.arange(num_experts).repeat(4)[:, None]  # every rank has 4 tokens for every expert
        hidden = torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(comm.rank))
        output = engine.forward(0, hidden, ids, torch.ones_like(ids, dtype=torch.float32))
        expected = torch.empty_like(hidden)
        for expert in range(num_experts):
            rows = hidden[ids[:, 0] == expert]
            out = torch.empty_like(rows)
            layer.function(layer.expert(expert), rows, out)
            expected[ids[:, 0] == expert] = out
        torch.testing.assert_close(output, expected)
        engine.close()

    run_threads(world_size, rank_main)
    assert executed_before_the_gate == ([4] if opened_by == "its own tokens" else [4, 4])


def test_the_first_rows_travel_before_the_rest_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """With those of the first stage, which has no rows, the second's are gathered, and sent."""
    events: list[str] = []

    class Telling(ThreadCommunicator):
        def copy_between_peers(
            self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
        ) -> PeerCopies:
            if self.rank == 0:
                events.append(f"exchange {sum(len(rows) for rows, _ in sends)}")
            return super().copy_between_peers(sends, receives)

    gather = Gathering.gather

    def telling(gathering: Gathering, columns: range) -> None:
        if threading.current_thread().name == "rank 0":
            events.append(f"gather {columns.start} to {columns.stop}")
        gather(gathering, columns)

    monkeypatch.setattr(Gathering, "gather", telling)

    run_in_stages(Telling)
    assert events[:5] == ["gather 0 to 4", "exchange 0", "exchange 6", "gather 4 to 6", "exchange 2"]


def test_results_are_added_up_while_the_last_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Last:
        def __init__(self, work: Any) -> None:
            self._work = work

        def wait(self) -> None:
            events.append("waits for the last")
            self._work.wait()

    class Telling(ThreadCommunicator):
        calls = 0

        def copy_between_peers(
            self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
        ) -> PeerCopies:
            copies, self.calls = super().copy_between_peers(sends, receives), self.calls + 1
            if self.rank != 0 or self.calls < 6:  # rows of three stages, and results of two
                return copies
            return PeerCopies([[Last(work) for work in works] for works in copies.receiving], copies.sending)

    def telling(rows: Tensor, weights: Tensor, sent: Sent, later: Sequence[slice] = ()) -> Tensor:
        if threading.current_thread().name == "rank 0":
            events.append(f"adds up without {later}")
        return weighted_sum(rows, weights, sent, later)

    monkeypatch.setattr(staged, "weighted_sum", telling)
    run_in_stages(Telling)
    # Of 4 assignments of each expert the last 2, those of two of them.
    assert events == [f"adds up without {[slice(12, 16)]}", "waits for the last"]


class InStages(StaticEP):
    """Three stages on two ranks with two experts each: nothing, three quarters of the rows, the rest."""

    knows = frozenset({Knowledge.EXACT})

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        plan = super().plan(counts, placement)
        begins = np.array([[0, 0], [8, 0], [0, 0], [0, 8]])
        return replace(plan, stages=Stages(begins, np.array([[0, 0], [0, 0], [12, 12], [16, 16]])))


def run_in_stages(communicator: type[ThreadCommunicator]) -> None:
    """Execute a layer of :class:`InStages`, in threads that are called as their ranks, and check the output."""

    def rank_main(comm: ThreadCommunicator) -> None:
        threading.current_thread().name = f"rank {comm.rank}"
        layer = random_experts(4, 0)
        engine = start([layer], communicator(comm.world, comm.rank), record=False)
        engine.use(engine.build_system("x", InStages()))
        ids = torch.arange(4).repeat(4)[:, None]  # every rank has 4 tokens for every expert
        hidden = torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(comm.rank))
        output = engine.forward(0, hidden, ids, torch.ones_like(ids, dtype=torch.float32))
        for expert in range(4):
            rows = hidden[ids[:, 0] == expert]
            out = torch.empty_like(rows)
            layer.function(layer.expert(expert), rows, out)
            torch.testing.assert_close(output[ids[:, 0] == expert], out)
        engine.close()

    run_threads(2, rank_main)
