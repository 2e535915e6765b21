"""Systems with an executor of their own on real ranks: exact, and what they record is what they did."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harmoeny.placement import place
from harmoeny.policy import Policy
from harmoeny.runtime.comm import Communicator
from harmoeny.runtime.engine import ExpertParallel
from harmoeny.runtime.recorder import Phase, Recorder
from tests.harmoeny.runtime.cases import (
    CPU,
    TOLERANCE,
    Tokens,
    expected_output,
    random_experts,
    random_tokens,
    rank_memory,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks
WORLD_SIZE, NUM_EXPERTS = 2, 6
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test does"
)


@dataclass(frozen=True)
class Case:
    """Two batches of one layer: tokens per rank in each."""

    policy: Policy
    num_tokens: tuple[tuple[int, int], ...] = ((9, 9), (20, 3))
    top_k: int = 2
    masked: float = 0.0
    dtype: torch.dtype = torch.float32
    experts: dict[str, bool] = field(default_factory=dict)

    def tokens(self, batch: int, rank: int) -> Tokens:
        return random_tokens(
            100 * batch + rank,
            self.num_tokens[batch][rank],
            NUM_EXPERTS,
            self.top_k,
            dtype=self.dtype,
            masked=self.masked,
        )


@dataclass(frozen=True)
class Outcome:
    """What a rank saw of one batch."""

    error: float
    kept: Any
    padded_tokens: int
    executed_tokens: int
    boundaries_s: list[float]


def run_cases(rank: int, cases: list[Case]) -> list[list[Outcome]]:
    outcomes: list[list[Outcome]] = []
    for case in cases:
        layer = random_experts(NUM_EXPERTS, seed=1, dtype=case.dtype, **case.experts)
        engine = ExpertParallel(rank_memory([layer], Communicator(CPU)), Recorder(CPU))
        system = engine.build_system("x", case.policy)
        outcomes.append([])
        for batch in range(len(case.num_tokens)):
            t = case.tokens(batch, rank)
            engine.use(system)
            engine.keep_masks, engine.kept_TK = True, []
            engine.recorder.begin_iteration()
            engine.recorder.begin_layer(0)
            output = engine.forward(0, t.hidden, t.ids, t.weights)
            engine.finish()
            (kept,) = engine.kept_TK
            expected = expected_output(layer, t.hidden, t.ids, t.weights, kept)
            assert output.shape == t.hidden.shape
            error = float((output.double() - expected).abs().max() / expected.abs().max()) if len(output) else 0.0
            (times,) = engine.recorder.collect()
            assert times.trace.plan is not None
            executed = times.trace.plan.tokens[:, :, rank].sum()
            outcomes[-1].append(
                Outcome(error, kept.numpy(), times.trace.padded_tokens, int(executed), times.boundary_s)
            )
        engine.memory.engine.close()
    return outcomes


def counts_of(case: Case, batch: int) -> Any:
    ids = [case.tokens(batch, rank).ids.numpy() for rank in range(WORLD_SIZE)]
    return np.array([[(i == e).sum() for e in range(NUM_EXPERTS)] for i in ids])


def check_phases(outcome: Outcome) -> None:
    assert len(outcome.boundaries_s) == len(Phase)
    assert outcome.boundaries_s == sorted(outcome.boundaries_s)


def check_exact(cases: list[Case], by_rank: list[list[list[Outcome]]]) -> None:
    for rank, of_cases in enumerate(by_rank):
        for case, outcomes in zip(cases, of_cases, strict=True):
            for batch, outcome in enumerate(outcomes):
                assert outcome.error <= TOLERANCE[case.dtype], case
                np.testing.assert_array_equal(outcome.kept, case.tokens(batch, rank).ids.numpy() >= 0)
                home = place(case.policy.placement, NUM_EXPERTS, WORLD_SIZE).home == rank
                assert outcome.executed_tokens == counts_of(case, batch)[:, home].sum()
                check_phases(outcome)


@needs_deepspeed
def test_deepspeed_is_exact_pads_to_the_largest_count_and_drops_what_exceeds_a_capacity(tmp_path: Path) -> None:
    from baselines.deepspeed_moe import DeepSpeedMoE, DeepSpeedMoEDrop

    exact = [
        Case(DeepSpeedMoE(), top_k=1),
        Case(DeepSpeedMoE(placement="round_robin"), experts={"gated": True, "bias": True}),
        Case(DeepSpeedMoE(), top_k=3, masked=0.3, num_tokens=((17, 8), (0, 5))),
        Case(DeepSpeedMoE(), num_tokens=((0, 0), (4, 4))),
        Case(DeepSpeedMoE(), dtype=torch.bfloat16, experts={"bias": True}),
    ]
    # Capacities by hand: ceil(most assignments of a rank / 6 experts * factor), at least 4.
    dropping = [
        (Case(DeepSpeedMoEDrop(), num_tokens=((30, 30), (40, 12))), (10, 14)),
        (
            Case(DeepSpeedMoEDrop(capacity_factor=0.5), top_k=1, num_tokens=((30, 30), (0, 64)), masked=0.0),
            (4, 6),
        ),
    ]
    cases = exact + [case for case, _ in dropping]
    by_rank = run_ranks(WORLD_SIZE, run_cases, tmp_path, cases)

    check_exact(exact, [of_cases[: len(exact)] for of_cases in by_rank])
    for rank, of_cases in enumerate(by_rank):
        for case, outcomes in zip(exact, of_cases, strict=False):
            for batch, outcome in enumerate(outcomes):
                counts = counts_of(case, batch)
                # Both ranks send all 3 experts of this rank as many rows as the most that a rank has for an expert.
                rows = WORLD_SIZE * (NUM_EXPERTS // WORLD_SIZE) * counts.max()
                assert outcome.padded_tokens == rows - outcome.executed_tokens
        for (case, capacities), outcomes in zip(dropping, of_cases[len(exact) :], strict=True):
            for batch, (outcome, capacity) in enumerate(zip(outcomes, capacities, strict=True)):
                assert outcome.error <= TOLERANCE[case.dtype]
                assert outcome.executed_tokens + outcome.padded_tokens == NUM_EXPERTS * capacity
                ids = case.tokens(batch, rank).ids.numpy()
                for expert in range(NUM_EXPERTS):
                    wanted = np.flatnonzero(ids.reshape(-1) == expert)
                    kept = np.flatnonzero(outcome.kept.reshape(-1) & (ids.reshape(-1) == expert))
                    np.testing.assert_array_equal(kept, wanted[:capacity])
        assert any(not outcome.kept.all() for outcomes in of_cases[len(exact) :] for outcome in outcomes)
