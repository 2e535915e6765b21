"""Executors are found by the name that a policy gives, and a wrong name is refused before anything runs."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from baselines.executors.pairwise import PairwiseExecutor
from baselines.fastermoe import FasterMoE
from baselines.static_ep import StaticEP
from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.rebalance import HarMoEny
from harmoeny.runtime.layer.executor import LayerInput, LayerResult, PlanExecutor, find_executor
from tests.conftest import Load
from tests.harmoeny.runtime.cases import random_experts, random_tokens, start
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads


class Doubling(PlanExecutor):
    """What a user might write: the standard way, and then something of the policy's own."""

    def execute(self, given: LayerInput, counts: IntArray, plan: Plan) -> LayerResult:
        result = super().execute(given, counts, plan)
        assert isinstance(self.planner.policy, Doubled)
        result.output_TH.mul_(self.planner.policy.factor)
        return result


class Doubled(StaticEP):
    executor: ClassVar[str] = f"{__name__}:Doubling"
    factor: ClassVar[int] = 2


class Unfit(StaticEP):
    executor: ClassVar[str] = FasterMoE().executor


class OneRank(StaticEP):
    def validate_ranks(self, num_experts: int, world_size: int) -> None:  # noqa: ARG002
        if world_size > 1:
            raise ValueError(f"world_size: {world_size}, must be 1")


def test_the_runtimes_own_is_the_default_and_others_are_named_by_import_path() -> None:
    assert find_executor(HarMoEny().executor) is PlanExecutor
    assert find_executor(FasterMoE().executor) is PairwiseExecutor
    assert find_executor(FasterMoE(smart_scheduling=False).executor) is PlanExecutor
    assert find_executor(Doubled().executor) is Doubling


def test_an_executor_of_ones_own_reads_the_options_of_its_policy() -> None:
    def rank_main(comm: ThreadCommunicator) -> None:
        engine, tokens = start([random_experts(2, 0)], comm, record=False), random_tokens(0, 4, 2, 1)
        outputs = []
        for policy in (StaticEP(), Doubled()):
            policy.validate()
            engine.use(engine.build_system("x", policy))
            outputs.append(engine.forward(0, tokens.hidden, tokens.ids, tokens.weights))
        torch.testing.assert_close(outputs[1], 2 * outputs[0])
        engine.close()

    run_threads(1, rank_main)


@pytest.mark.parametrize(
    "name", ["fast", "baselines.executors.pairwise", "a:b:c", "no module:Executor", ":Executor", ""]
)
def test_a_name_that_is_no_import_path_is_refused_by_the_policy(name: str) -> None:
    class Wrong(StaticEP):
        executor: ClassVar[str] = name

    with pytest.raises(
        ValueError, match=r"^executor: '.*', must be plan or an import path, as package.module:ClassName$"
    ):
        Wrong().validate()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such_module:Executor", "No module named 'no_such_module'"),
        ("baselines.executors.pairwise:NoSuchExecutor", "baselines.executors.pairwise has no such class"),
        ("baselines.executors.pairwise:np", "baselines.executors.pairwise has no such class"),
        ("baselines.static_ep:StaticEP", "baselines.static_ep has no such class"),
    ],
)
def test_what_is_no_executor_is_refused_in_one_line(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=rf"^executor: '{name}', must be plan or .* \({why}\)$"):
        find_executor(name)


def test_a_run_is_refused_before_its_ranks_start(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StaticEP, "executor", "no_such_module:Executor")
    with pytest.raises(ValueError, match=r"^systems.static_ep.executor: 'no_such_module:Executor', must be plan or"):
        load("system=[static_ep]")


def test_an_executor_whose_options_the_policy_lacks_is_refused() -> None:
    def rank_main(comm: ThreadCommunicator) -> None:
        engine = start([random_experts(2, 0)], comm, record=False)
        with pytest.raises(ValueError, match=r"executor: .*, must go with a policy that has source_groups"):
            engine.build_system("x", Unfit())

    run_threads(1, rank_main)


def test_ranks_that_a_policy_cannot_run_on_are_refused() -> None:
    def rank_main(comm: ThreadCommunicator) -> None:
        engine = start([random_experts(3, 0)], comm, record=False)
        with pytest.raises(ValueError, match="world_size: 2, must be 1"):
            engine.build_system("x", OneRank())

    run_threads(2, rank_main)


@pytest.mark.processes
def test_importing_deepspeeds_executor_does_not_import_deepspeed() -> None:
    code = "import sys; import baselines.executors.deepspeed; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
