"""Systems with an executor of their own on real ranks: exact, and what they record is what they did."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from baselines.fastermoe import FasterMoE
from harmoeny.placement import place
from harmoeny.policy import Policy
from harmoeny.runtime.layer.recorder import Phase
from tests.harmoeny.runtime.cases import (
    TOLERANCE,
    Tokens,
    expected_output,
    random_experts,
    random_tokens,
    start,
)
from tests.ranks import run_ranks

pytestmark = pytest.mark.ranks
WORLD_SIZE, NUM_EXPERTS = 2, 6


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
        engine = start([layer])
        system = engine.build_system("x", case.policy)
        outcomes.append([])
        for batch in range(len(case.num_tokens)):
            t = case.tokens(batch, rank)
            engine.use(system)
            engine.recorder.begin_iteration()
            engine.recorder.begin_layer(0)
            with engine.executed_masks() as masks:
                output = engine.forward(0, t.hidden, t.ids, t.weights)
            engine.finish()
            (kept,) = masks
            expected = expected_output(layer, t.hidden, t.ids, t.weights, kept)
            assert output.shape == t.hidden.shape
            error = float((output.double() - expected).abs().max() / expected.abs().max()) if len(output) else 0.0
            (times,) = engine.recorder.collect()
            assert times.marks.plan is not None
            executed = times.marks.plan.tokens[:, :, rank].sum()
            outcomes[-1].append(
                Outcome(error, kept.numpy(), times.marks.padded_tokens, int(executed), times.boundary_s)
            )
        engine.close()
    return outcomes


def counts_of(case: Case, batch: int) -> Any:
    ids = [case.tokens(batch, rank).ids.numpy() for rank in range(WORLD_SIZE)]
    return np.array([[(i == e).sum() for e in range(NUM_EXPERTS)] for i in ids])


def check_phases(outcome: Outcome) -> None:
    assert len(outcome.boundaries_s) == len(Phase)
    assert outcome.boundaries_s == sorted(outcome.boundaries_s)


EXACT = [
    Case(FasterMoE(shadowing=False), num_tokens=((20, 3), (0, 7))),
    Case(FasterMoE(shadowing=False, group_size=2), top_k=3, masked=0.3, experts={"gated": True, "bias": True}),
    Case(FasterMoE(token_s=1.0, shadow_s=1.0), num_tokens=((30, 9), (0, 0))),
    Case(FasterMoE(token_s=1.0, shadow_s=1.0, fetch="async", num_slots=2), dtype=torch.bfloat16),
    Case(FasterMoE(token_s=1.0, shadow_s=1.0, smart_scheduling=False)),
]
#: With capacities by hand: ceil(most assignments of a rank / 6 experts * factor), at least 4.
DROPPING: list[tuple[Case, tuple[int, int]]] = []
if find_spec("deepspeed") is not None:
    from baselines.deepspeed_moe import DeepSpeedMoE, DeepSpeedMoEDrop

    EXACT += [
        Case(DeepSpeedMoE(), top_k=1),
        Case(DeepSpeedMoE(placement="round_robin"), experts={"gated": True, "bias": True}),
        Case(DeepSpeedMoE(), top_k=3, masked=0.3, num_tokens=((17, 8), (0, 5))),
        Case(DeepSpeedMoE(), num_tokens=((0, 0), (4, 4))),
        Case(DeepSpeedMoE(), dtype=torch.bfloat16, experts={"bias": True}),
    ]
    DROPPING = [
        (Case(DeepSpeedMoEDrop(), num_tokens=((30, 30), (40, 12))), (10, 14)),
        (Case(DeepSpeedMoEDrop(capacity_factor=0.5), top_k=1, num_tokens=((30, 30), (0, 64))), (4, 6)),
    ]
needs_deepspeed = pytest.mark.skipif(not DROPPING, reason="DeepSpeed is not installed: make test does")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Outcome]]]:
    """What every rank saw of every batch of every case, the dropping ones last."""
    cases = EXACT + [case for case, _ in DROPPING]
    return run_ranks(WORLD_SIZE, run_cases, tmp_path_factory.mktemp("ranks"), cases)


@pytest.mark.parametrize("number", range(len(EXACT)), ids=[f"{c.policy.name}-{i}" for i, c in enumerate(EXACT)])
def test_exact(number: int, outcomes: list[list[list[Outcome]]]) -> None:
    case = EXACT[number]
    home = place(case.policy.placement, NUM_EXPERTS, WORLD_SIZE).home
    for batch in range(len(case.num_tokens)):
        counts = counts_of(case, batch)
        by_rank = [of_cases[number][batch] for of_cases in outcomes]
        for rank, outcome in enumerate(by_rank):
            assert outcome.error <= TOLERANCE[case.dtype]
            np.testing.assert_array_equal(outcome.kept, case.tokens(batch, rank).ids.numpy() >= 0)
            assert len(outcome.boundaries_s) == len(Phase)
            assert outcome.boundaries_s == sorted(outcome.boundaries_s)
            if not getattr(case.policy, "shadowing", False):
                assert outcome.executed_tokens == counts[:, home == rank].sum()
        assert sum(outcome.executed_tokens for outcome in by_rank) == counts.sum()


@needs_deepspeed
def test_padding_is_up_to_the_largest_count_with_deepspeed_and_none_elsewhere(
    outcomes: list[list[list[Outcome]]],
) -> None:
    for of_cases in outcomes:
        for case, by_batch in zip(EXACT, of_cases, strict=False):
            for batch, outcome in enumerate(by_batch):
                rows = outcome.executed_tokens
                if isinstance(case.policy, DeepSpeedMoE):
                    # Both ranks send 3 experts of this rank as many rows as the most that a rank has for any expert.
                    rows = WORLD_SIZE * (NUM_EXPERTS // WORLD_SIZE) * counts_of(case, batch).max()
                assert outcome.padded_tokens == rows - outcome.executed_tokens


@needs_deepspeed
def test_a_capacity_keeps_the_first_assignments_of_every_rank_and_expert(outcomes: list[list[list[Outcome]]]) -> None:
    for rank, of_cases in enumerate(outcomes):
        for (case, capacities), by_batch in zip(DROPPING, of_cases[len(EXACT) :], strict=True):
            for batch, (outcome, capacity) in enumerate(zip(by_batch, capacities, strict=True)):
                assert outcome.error <= TOLERANCE[case.dtype]
                assert outcome.executed_tokens + outcome.padded_tokens == NUM_EXPERTS * capacity
                ids = case.tokens(batch, rank).ids.numpy().reshape(-1)
                for expert in range(NUM_EXPERTS):
                    kept = np.flatnonzero(outcome.kept.reshape(-1) & (ids == expert))
                    np.testing.assert_array_equal(kept, np.flatnonzero(ids == expert)[:capacity])
        assert not all(outcome.kept.all() for by_batch in of_cases[len(EXACT) :] for outcome in by_batch)
