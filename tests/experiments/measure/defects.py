"""Systems and models with one defect each, for tests of the check."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from baselines.static_ep import StaticEP
from harmoeny.choices import Knowledge
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.runtime.layer.executor import LayerInput, LayerResult
from harmoeny.runtime.layer.plan_executor import PlanExecutor


def _on_rank(rank: int) -> bool:
    return int(os.environ.get("RANK", "0")) == rank


class DefectiveExecutor(PlanExecutor):
    """Carries plans out with the defect that its policy names."""

    def execute(self, given: LayerInput, counts: IntArray, plan: Plan) -> LayerResult:
        policy = self.planner.policy
        assert isinstance(policy, Defective)
        before, after = _DEFECTS[policy.defect]
        given = before(given)
        return after(super().execute(given, counts, plan))


def _same(value: LayerInput) -> LayerInput:
    return value


def _kept(result: LayerResult) -> LayerResult:
    return result


def _swapped(given: LayerInput) -> LayerInput:
    """Exchange experts 0 and 1 of equally many tokens, so that the counts stay what was planned."""
    ids = given.expert_ids_TK.clone()
    first, second = torch.where(ids.flatten() == 0)[0], torch.where(ids.flatten() == 1)[0]
    number = min(len(first), len(second))
    ids.view(-1)[first[:number]], ids.view(-1)[second[:number]] = 1, 0
    return replace(given, expert_ids_TK=ids)


def _unscaled(given: LayerInput) -> LayerInput:
    return replace(given, routing_weights_TK=torch.ones_like(given.routing_weights_TK))


def _lost(result: LayerResult) -> LayerResult:
    assert result.assignment_S is not None
    return replace(result, assignment_S=result.assignment_S[1:])


def _changed(change: Callable[[Tensor], Tensor]) -> Callable[[LayerResult], LayerResult]:
    return lambda result: replace(result, output_TH=change(result.output_TH.clone()))


def _not_a_number(output: Tensor) -> Tensor:
    output[0, 0] = float("nan")
    return output


def _last_rank_off(output: Tensor) -> Tensor:
    return output * 1.01 if _on_rank(int(os.environ.get("WORLD_SIZE", "1")) - 1) else output


#: By name: what changes a layer's input, and what changes its result.
_DEFECTS: dict[str, tuple[Callable[[LayerInput], LayerInput], Callable[[LayerResult], LayerResult]]] = {
    "none": (_same, _kept),
    "lost assignment": (_same, _lost),
    "experts swapped": (_swapped, _kept),
    "unscaled weights": (_unscaled, _kept),
    "one rank wrong": (_same, _changed(_last_rank_off)),
    "not a number": (_same, _changed(_not_a_number)),
    "rounded to bf16": (_same, _changed(lambda output: output.bfloat16().float())),
    "output in bf16": (_same, _changed(lambda output: output.bfloat16())),
}


@dataclass(kw_only=True)
class Defective(StaticEP):
    """Static EP with a defect in carrying the plan out, or in the plan.

    Attributes:
        defect: which.
    """

    name: ClassVar[str] = "defective"
    description: ClassVar[str] = "has one defect"
    executor: ClassVar[str] = "tests.experiments.measure.defects:DefectiveExecutor"

    defect: str = "none"


@dataclass(kw_only=True)
class BadPlans(StaticEP):
    """Static EP whose plans have a defect.

    Attributes:
        defect: which.
    """

    name: ClassVar[str] = "bad_plans"
    description: ClassVar[str] = "plans with one defect"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT})

    defect: str

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        plan = super().plan(counts, placement)
        _, expert, _ = (int(i) for i in np.argwhere(plan.tokens)[0])
        if self.defect == "loses tokens":
            plan.tokens[:, expert, :] = 0
        elif self.defect == "executes twice":
            plan.tokens[0, expert] *= 2
        elif self.defect == "executes without weights":
            plan.fetch[:] = False
            plan.tokens[:] = np.roll(plan.tokens, 1, axis=2)
        elif self.defect == "differs on rank 1" and _on_rank(1):
            tokens = np.roll(plan.tokens, 1, axis=2)
            return Plan(tokens, (tokens.sum(axis=0) > 0) & ~placement.resident)
        elif self.defect == "raises on rank 1" and _on_rank(1):
            raise KeyError("no such expert")
        return plan
