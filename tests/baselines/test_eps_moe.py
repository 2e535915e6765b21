from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from math import inf, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baselines.eps_moe import EpsMoE, StageCosts, best_stages, expert_stages, overlapped_s, stages_gain_s
from harmoeny.cost import ExpertCost
from harmoeny.placement import place
from harmoeny.plan import Plan
from harmoeny.runtime.exchange.comm import PeerCopies
from harmoeny.runtime.kernels.loop import LoopKernel
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.memory.experts import LayerExperts
from tests.harmoeny.runtime.cases import expected_output, random_experts, random_tokens, start
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads
from tests.strategies import examples

seconds = st.floats(1e-6, 1e-1)


@examples(100)
@given(overlapped=seconds, stage=seconds, num_experts=st.integers(1, 64))
def test_the_number_of_stages_is_the_best_of_all(overlapped: float, stage: float, num_experts: int) -> None:
    divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
    # What overlaps, and what stages cost; one stage has neither.
    gains = {n: overlapped - overlapped / n - stage * (n - 1) for n in divisors}
    best = best_stages(overlapped, stage, num_experts)
    assert best in divisors
    assert gains[best] == pytest.approx(max(gains.values()), rel=1e-9, abs=1e-12)


@examples(50)
@given(optimum=st.integers(1, 20), stage=seconds, multiple=st.integers(1, 4))
def test_where_the_optimum_divides_it_is_taken_and_gains_what_the_paper_says(
    optimum: int, stage: float, multiple: int
) -> None:
    overlapped = stage * optimum**2  # N = sqrt(C / k)
    best = best_stages(overlapped, stage, optimum * multiple)
    gain = stages_gain_s(best, overlapped, stage)
    assert gain == pytest.approx(overlapped + stage - 2 * sqrt(stage * overlapped), rel=1e-9, abs=1e-15)
    assert gain >= stages_gain_s(optimum, overlapped, stage) - 1e-15


def test_what_could_overlap_is_the_shorter_of_exchange_and_products_of_the_slowest_rank() -> None:
    home, cost = np.array([0, 0, 1, 1]), ExpertCost(token_s=1.0, fetch_s=1.0, exchange_token_s=10.0)
    counts = np.array([[5, 0, 2, 0], [3, 1, 1, 1]])
    # Rank 0 gets 4 rows and sends 2, rank 1 the reverse; rank 0 executes 9 of 13.
    for changes, wanted in (
        ({}, 9.0),
        ({"exchange_token_s": 0.5}, 2 * 4 * 0.5),
        ({"weights_s": 7.0}, 8.0 + 7.0),  # expert 1 has one token
        ({"launch_s": 2.0}, 9.0 + 2 * 2.0),
        ({"launch_s": 2.0, "grouped": True}, 9.0),
    ):
        assert overlapped_s(counts, home, StageCosts.of(replace(cost, **changes))) == wanted  # type: ignore[arg-type]


def test_every_ranks_experts_are_divided_in_their_order() -> None:
    assert expert_stages(place("contiguous", 8, 2).home, 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert expert_stages(place("round_robin", 8, 2).home, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert expert_stages(place("contiguous", 5, 2).home, 2).tolist() == [0, 0, 1, 0, 1], "3 and 2 experts"


def plan_of(policy: EpsMoE, cost: ExpertCost) -> Plan:
    return policy.calibrated(cost).plan(np.full((2, 8), 100), place("contiguous", 8, 2))


def test_stages_follow_the_machine() -> None:
    cost = ExpertCost(token_s=1e-6, fetch_s=1.0, exchange_token_s=1e-6)  # 800 us of products, 800 of exchange
    for latency_s, num_stages in ((25e-6, 4), (100e-6, 2), (1e-3, 1)):
        plan = plan_of(EpsMoE(), replace(cost, exchange_latency_s=latency_s))
        assert (1 if plan.stages is None else plan.stages.num_stages) == num_stages
    assert plan_of(EpsMoE(stage_s=1e-3), cost).stages is None
    assert plan_of(EpsMoE(), replace(cost, overlaps=False)).stages is None
    unknown = plan_of(EpsMoE(), cost).stages
    assert unknown is not None
    assert unknown.num_stages == 2, "two stages where nothing is known of what they cost"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_stages": 0}, "num_stages: 0, must be at least 1"),
        ({"dense_from": 0}, "dense_from: 0, must be at least 1"),
        ({"stage_s": inf}, "stage_s: inf, must be above 0"),
        ({"stage_s": 1.0, "num_stages": 2}, "stage_s: 1.0, must be null with num_stages=2"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EpsMoE(**options).validate()  # type: ignore[arg-type]


def test_there_must_be_experts_for_all_stages() -> None:
    EpsMoE(num_stages=4).validate_ranks(8, 2)
    with pytest.raises(ValueError, match="num_stages: 5, must be at most 4"):
        EpsMoE(num_stages=5).validate_ranks(8, 2)


class GatedCommunicator(ThreadCommunicator):
    """Rank 1 sends rank 0 the second stage's rows only once rank 0 starts to send back the first stage's results."""

    gate: threading.Event
    calls = 0

    def copy_between_peers(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> PeerCopies:
        self.calls += 1
        if self.rank == 0 and self.calls == 3:
            self.gate.set()
        if self.rank == 1 and self.calls == 2:
            assert self.gate.wait(10), "rank 0 waits for all stages before it does anything with the first"
        return super().copy_between_peers(sends, receives)


def check_layer(engine: ExpertParallel, experts: LayerExperts, rank: int) -> None:
    """Execute tokens of the rank and compare with what their experts give."""
    t = random_tokens(rank, 32, 4, 2)
    output = engine.forward(0, t.hidden, t.ids, t.weights)
    expected = expected_output(experts, t.hidden, t.ids, t.weights, torch.ones_like(t.ids, dtype=torch.bool))
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_stage_is_executed_and_returned_while_the_next_is_on_its_way() -> None:
    experts, gate = random_experts(4, 0), threading.Event()

    def rank_main(comm: ThreadCommunicator) -> None:
        gated = GatedCommunicator(comm.world, comm.rank)
        gated.gate = gate
        engine = start([experts], gated, record=False)
        engine.use(engine.build_system("x", EpsMoE(num_stages=2)))
        check_layer(engine, experts, comm.rank)
        engine.close()

    run_threads(2, rank_main)
    assert gate.is_set()


@pytest.mark.parametrize(("dense_from", "num_slices"), [(None, 0), (1000, 0), (1, 4)])
def test_large_slices_are_left_to_dense_products(
    monkeypatch: pytest.MonkeyPatch, dense_from: int | None, num_slices: int
) -> None:
    experts, computed = random_experts(4, 0), []
    compute = LoopKernel.__call__

    def counted(self: LoopKernel, wave: object, *rows: object) -> None:
        computed.extend(wave.slots)  # type: ignore[attr-defined]
        compute(self, wave, *rows)  # type: ignore[arg-type]

    monkeypatch.setattr(LoopKernel, "__call__", counted)

    def rank_main(comm: ThreadCommunicator) -> None:
        engine = start([experts], comm, record=False, kernel="grouped_mm")
        engine.use(engine.build_system("x", EpsMoE(num_stages=2, dense_from=dense_from)))
        check_layer(engine, experts, comm.rank)
        engine.close()

    run_threads(2, rank_main)
    assert len(computed) == num_slices
