"""EPS-MoE: experts in stages, the exchange of one behind the products of another."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from math import inf, sqrt
from typing import ClassVar, NamedTuple, Self

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.cost import ExpertCost
from harmoeny.lines import stages_of_experts
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan, home_tokens, plan_from_tokens
from harmoeny.policy import Policy

#: Stages where calibration does not know what one more costs: those of most of the authors' measurements.
_USUAL_STAGES = 2


class StageCosts(NamedTuple):
    """Seconds by the names of :class:`harmoeny.cost.ExpertCost`, and what follows from them for stages.

    Attributes:
        token_s: executing one more assignment.
        slice_s: what a slice takes whatever its assignments.
        weights_s: reading an expert's weights, the least that a slice takes beside that.
        exchange_token_s: receiving one more row.
        stage_s: one more stage: its exchange there and back and, where all of it is launched at once, its launch; 0:
            not known; infinite: rows do not travel while ranks compute.
    """

    token_s: float
    slice_s: float
    weights_s: float
    exchange_token_s: float
    stage_s: float

    @classmethod
    def of(cls, cost: ExpertCost) -> Self:
        """Return those of a machine."""
        slice_s, launch_s = (0.0, cost.launch_s) if cost.grouped else (cost.launch_s, 0.0)
        stage_s = 2 * cost.exchange_latency_s + launch_s if cost.overlaps else inf
        return cls(cost.token_s, slice_s, cost.weights_s, cost.exchange_token_s, stage_s)


@dataclass(kw_only=True)
class EpsMoE(Policy):
    """The expert pipeline of EPS-MoE (arXiv 2410.12247): experts are executed at home, in N stages.

    Every stage sends tokens for its experts only, so the exchange of one is behind the products of another, and no
    weights are read twice. With ``C`` the time of what could overlap at best, exchange or products, and ``k`` what one
    more stage costs, N stages gain ``C (N - 1) / N - k (N - 1)``, which is most at ``N = sqrt(C / k)``.

    Attributes:
        num_stages: N; null: of the divisors of a rank's experts the one that gains most, for every layer and batch.
        stage_s: ``k`` in seconds; null: calibrated.
        dense_from: tokens per expert, in a stage, from which on experts are computed one after another, by a dense
            product each, and below which all together, where the run's kernel is a grouped one; null: never.
    """

    name: ClassVar[str] = "eps_moe"
    description: ClassVar[str] = "executes experts in stages: the exchange of one is behind the products of another"
    executor: ClassVar[str] = "baselines.executors.eps_moe:EpsMoEExecutor"

    chooses_stages: ClassVar[bool] = True

    num_stages: int | None = None
    stage_s: float | None = None
    dense_from: int | None = 4096

    def __post_init__(self) -> None:
        #: The machine's; None until calibrated. No option.
        self._costs: StageCosts | None = None

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number below 1, a time that is not positive, or one that nothing depends on.
        """
        super().validate()
        if self.dense_from is not None and self.dense_from < 1:
            raise ValueError(f"dense_from: {self.dense_from}, must be at least 1, or null")
        if self.stage_s is not None and not 0 < self.stage_s < float("inf"):
            raise ValueError(f"stage_s: {self.stage_s}, must be above 0, or null")
        if self.stage_s is not None and self.num_stages is not None:
            raise ValueError(f"stage_s: {self.stage_s}, must be null with num_stages={self.num_stages}")

    def validate_ranks(self, num_experts: int, world_size: int) -> None:
        """Check that there are experts for every stage.

        Raises:
            ValueError: more stages than a rank has experts.
        """
        most = -(-num_experts // world_size)
        if self.num_stages is not None and self.num_stages > most:
            raise ValueError(f"num_stages: {self.num_stages}, must be at most {most}, the experts of a rank")

    def calibrated(self, cost: ExpertCost) -> Self:
        """Return the policy with the machine's costs, and what a stage costs where that was not set."""
        calibrated, costs = copy(self), StageCosts.of(cost)
        if self.stage_s is not None and cost.overlaps:
            costs = costs._replace(stage_s=self.stage_s)
        calibrated._costs = costs
        return calibrated

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Execute ``counts`` (int64 ``[world_size, num_experts]``) at home, in stages where they pay.

        Raises:
            ValueError: what a stage costs was neither set nor calibrated.
        """
        plan = plan_from_tokens(home_tokens(counts, placement.home), placement)
        num_stages = self.num_stages or self._best(counts, placement)
        if num_stages < 2:
            return plan
        stages = np.repeat(expert_stages(placement.home, num_stages)[:, None], placement.world_size, axis=1)
        return replace(plan, stages=stages_of_experts(stages, plan.executed()))

    def _best(self, counts: IntArray, placement: Placement) -> int:
        """Return the number of stages that gains most by the cost model."""
        if self._costs is None:
            raise ValueError("num_stages: null, must be calibrated before planning (EpsMoE.calibrated)")
        costs, per_rank = self._costs, int(np.bincount(placement.home).max())
        if costs.stage_s == 0:
            return min(_USUAL_STAGES, per_rank)
        return best_stages(overlapped_s(counts, placement.home, costs), costs.stage_s, per_rank)


def overlapped_s(counts: IntArray, home: IntArray, costs: StageCosts) -> float:
    """Return ``C``: the shorter of the time that rows take there and back, and that of the products; seconds.

    Both are of the slowest rank, by the counts of the batch; of products, reading the weights is the least.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        home: int64 ``[num_experts]``.
        costs: the machine's.
    """
    return _overlapped_s(counts, home, costs.token_s, costs.slice_s, costs.weights_s, costs.exchange_token_s)


@compiled
def _overlapped_s(
    counts: IntArray, home: IntArray, token_s: float, slice_s: float, weights_s: float, exchange_token_s: float
) -> float:
    world_size, num_experts = counts.shape
    sent, executed = np.zeros(world_size, dtype=np.int64), np.zeros(num_experts, dtype=np.int64)
    received, products_s = np.zeros(world_size, dtype=np.int64), np.zeros(world_size)
    for rank in range(world_size):
        for expert in range(num_experts):
            executed[expert] += counts[rank, expert]
            if home[expert] != rank:
                sent[rank] += counts[rank, expert]
                received[home[expert]] += counts[rank, expert]
    for expert in range(num_experts):
        if executed[expert] > 0:
            products_s[home[expert]] += slice_s + max(executed[expert] * token_s, weights_s)
    return float(min(2 * max(sent.max(), received.max()) * exchange_token_s, products_s.max()))


def stages_gain_s(num_stages: float, overlapped_s: float, stage_s: float) -> float:
    """Return how many seconds so many stages gain over one: ``C (N - 1) / N - k (N - 1)``.

    Args:
        num_stages: ``N``.
        overlapped_s: ``C``, what could overlap at best.
        stage_s: ``k``, what one more stage costs.
    """
    return (overlapped_s / num_stages - stage_s) * (num_stages - 1)


def best_stages(overlapped_s: float, stage_s: float, num_experts: int) -> int:
    """Return the divisor of a rank's number of experts that gains most: one beside ``sqrt(C / k)``.

    Args:
        overlapped_s: ``C``, what could overlap at best.
        stage_s: ``k``, what one more stage costs, above 0.
        num_experts: of a rank.
    """
    if stage_s >= overlapped_s:
        return 1
    optimum = sqrt(overlapped_s / stage_s)
    divisors = [n for n in range(1, num_experts + 1) if num_experts % n == 0]
    below = max((n for n in divisors if n <= optimum), default=1)
    above = min((n for n in divisors if n >= optimum), default=num_experts)
    return max((below, above), key=lambda n: stages_gain_s(n, overlapped_s, stage_s))


@compiled
def expert_stages(home: IntArray, num_stages: int) -> IntArray:
    """Divide every rank's experts, in their order, into as many stages, which differ by one expert at most.

    Args:
        home: int64 ``[num_experts]``.
        num_stages: at least 1.

    Returns:
        int64 ``[num_experts]``, the stage of every expert.
    """
    stages, number, held = np.empty_like(home), np.zeros(home.max() + 1, dtype=np.int64), np.bincount(home)
    for expert in range(len(home)):
        rank = home[expert]
        stages[expert] = number[rank] * num_stages // held[rank]
        number[rank] += 1
    return stages
