"""Executors are found by the name that a policy gives, and a wrong name is refused before anything runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from baselines.drop import Drop
from baselines.eplb import EPLB
from baselines.fastermoe import FasterMoE
from baselines.static_ep import StaticEP
from harmoeny.cost import ExpertCost
from harmoeny.hardware import Hardware
from harmoeny.head_start import HeadStart
from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.rebalance import TokenHarMoEny
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.executor import LayerInput, LayerResult
from harmoeny.runtime.layer.plan_executor import PlanExecutor, find_executor
from harmoeny.runtime.memory.slots import Slot
from harmoeny.runtime.memory.transfer import ThreadTransfers
from harmoeny.timed import HarMoEny
from tests.conftest import Load
from tests.harmoeny.runtime.cases import CPU, RandomPlan, expected_output, random_experts, random_tokens, start
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


class OneRank(StaticEP):
    def validate_ranks(self, num_experts: int, world_size: int) -> None:  # noqa: ARG002
        if world_size > 1:
            raise ValueError(f"world_size: {world_size}, must be 1")


def test_the_runtimes_own_is_the_default_and_others_are_named_by_import_path() -> None:
    assert find_executor(TokenHarMoEny().executor) is PlanExecutor
    assert find_executor(FasterMoE().executor) is PlanExecutor
    assert find_executor(Doubled().executor) is Doubling


@pytest.mark.parametrize("kernel", ["loop", "grouped_mm"])
def test_an_executor_of_ones_own_reads_the_options_of_its_policy(kernel: str) -> None:
    def rank_main(comm: ThreadCommunicator) -> None:
        engine, tokens = start([random_experts(2, 0)], comm, kernel=kernel, record=False), random_tokens(0, 4, 2, 1)
        outputs = []
        for policy in (StaticEP(), Doubled()):
            policy.validate()
            engine.use(engine.build_system("x", policy))
            outputs.append(engine.forward(0, tokens.hidden, tokens.ids, tokens.weights))
        torch.testing.assert_close(outputs[1], 2 * outputs[0])
        engine.close()

    run_threads(1, rank_main)


@pytest.mark.parametrize(
    "name", ["fast", "harmoeny.runtime.layer.executor", "a:b:c", "no module:Executor", ":Executor", ""]
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
        ("harmoeny.runtime.layer.executor:NoSuchExecutor", "harmoeny.runtime.layer.executor has no such class"),
        ("harmoeny.runtime.layer.executor:torch", "harmoeny.runtime.layer.executor has no such class"),
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


def test_ranks_that_a_policy_cannot_run_on_are_refused() -> None:
    def rank_main(comm: ThreadCommunicator) -> None:
        engine = start([random_experts(3, 0)], comm, record=False)
        with pytest.raises(ValueError, match="world_size: 2, must be 1"):
            engine.build_system("x", OneRank())

    run_threads(2, rank_main)


@pytest.mark.programs
def test_importing_deepspeeds_executor_does_not_import_deepspeed() -> None:
    code = "import sys; import baselines.executors.deepspeed; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class NoMoreThanCounts(Communicator):
    """Rank 0 of two, alone: it is told the counts, and all that it receives has a shape but no content."""

    def __init__(self, counts: IntArray) -> None:
        super().__init__(CPU)
        self.world_size, self.counts, self.num_gathered, self.num_begun = len(counts), counts, 0, 0

    def gather_counts(self, counts: Tensor) -> IntArray:  # noqa: ARG002
        self.num_gathered += 1
        return self.counts

    def begin_counts(self, counts: Tensor) -> Callable[[], IntArray]:
        self.num_begun += 1
        return lambda: self.gather_counts(counts)

    def exchange_rows(self, rows: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int]) -> Tensor:
        assert rows.shape[0] == sum(send_splits)
        return rows.new_empty((sum(recv_splits), rows.shape[1]))


class NoCopies(ThreadTransfers):
    """Its thread must not touch tensors without content, whose mode belongs to the computing thread."""

    def move(self, slot: Slot, source: Mapping[str, Tensor]) -> None:  # noqa: ARG002
        slot.refer(slot.buffers)


def layer_on_fake_tensors(kernel: str, comm: Communicator, policy: Policy | None = None, **options: Any) -> Tensor:
    """A layer whose tensors have no content, so that whatever wants to know any of it on the host is an error."""
    experts = random_experts(6, 0, width=16, gated=True, bias=True, dtype=torch.bfloat16)
    transfers = NoCopies(Hardware())
    engine = start([experts], comm, kernel=kernel, transfers=transfers, record=False)
    engine.use(engine.build_system("x", policy or TokenHarMoEny(threshold=1, **options)))
    tokens = random_tokens(0, 40, 6, 2, dtype=torch.bfloat16, masked=0.2)
    with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden, ids, weights = (mode.from_tensor(t) for t in (tokens.hidden, tokens.ids, tokens.weights))
        output = engine.forward(0, hidden, ids, weights)
    engine.close()
    transfers.close()
    return output


def test_one_rank_that_holds_everything_never_waits_for_the_device() -> None:
    assert layer_on_fake_tensors("grouped_mm", Communicator(CPU)).shape == (40, 8)
    with pytest.raises(RuntimeError, match="numpy"):
        layer_on_fake_tensors("loop", Communicator(CPU))


@pytest.mark.parametrize("kernel", ["grouped_mm", "loop"])
@pytest.mark.parametrize("num_slots", [None, 2])
def test_several_ranks_wait_for_nothing_but_the_counts(kernel: str, num_slots: int | None) -> None:
    ids = random_tokens(0, 40, 6, 2, dtype=torch.bfloat16, masked=0.2).ids
    own = np.bincount(ids[ids >= 0].numpy(), minlength=6)
    comm = NoMoreThanCounts(np.stack([own, own[::-1]]))
    assert layer_on_fake_tensors(kernel, comm, num_slots=num_slots).shape == (40, 8)
    assert comm.num_gathered == 1


def test_a_head_start_does_not_wait_for_the_device() -> None:
    ids = random_tokens(0, 40, 6, 2, dtype=torch.bfloat16, masked=0.2).ids
    own = np.bincount(ids[ids >= 0].numpy(), minlength=6)
    comm = NoMoreThanCounts(np.stack([own, own[::-1]]))
    early = HeadStart(most_rows=30, slice_rows=0, least_rows=2, tile_rows=2, batch_rows=1000)
    assert layer_on_fake_tensors("grouped_mm", comm, RandomPlan(3, early=early)).shape == (40, 8)
    assert comm.num_begun == 1


@pytest.mark.parametrize("guarded", [False, True])
def test_without_a_plan_a_rank_records_and_shows_the_plan_that_it_carried_out(guarded: bool) -> None:
    experts = random_experts(6, 0, width=16)
    tokens = random_tokens(0, 40, 6, 2, masked=0.2)
    plans: list[tuple[Any, int]] = []
    seen: list[IntArray] = []
    for kernel in ("loop", "grouped_mm"):
        engine = start([experts], kernel=kernel)
        system = engine.build_system("x", TokenHarMoEny(threshold=1))
        engine.use(system)
        if guarded:
            system.planner.guard = lambda _layer, counts, make: seen.append(counts) or make()  # type: ignore[func-returns-value]
        engine.recorder.begin_iteration()
        engine.recorder.begin_layer(0)
        engine.forward(0, tokens.hidden, tokens.ids, tokens.weights)
        assert len(seen) == (len(plans) + 1 if guarded else 0), "a guard sees a plan before the layer's output"
        (times,) = engine.recorder.collect()
        assert times.marks.plan is not None
        plans.append((times.marks.plan.tokens.tolist(), times.marks.num_assignments))
        assert times.boundary_s == sorted(times.boundary_s)
        engine.close()
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        (Drop(capacity_factor=1.0), True),
        (TokenHarMoEny(threshold=1, num_slots=2), True),
        (EPLB(interval=1, window=1), False),
        (HarMoEny(interval=1, window=2).calibrated(ExpertCost(1e-6, 1e-4)), False),
    ],
)
def test_a_rank_asks_for_a_plan_before_a_layer_where_that_could_drop_or_fetch(policy: Policy, asked: bool) -> None:
    experts = random_experts(6, 0, width=16)
    engine = start([experts], kernel="grouped_mm")
    system = engine.build_system("x", policy)
    engine.use(system)
    placement = system.planner.placements[0]
    for batch in range(3):  # what learns would place anew
        tokens = random_tokens(batch, 400, 6, 1)
        engine.recorder.begin_iteration()
        engine.recorder.begin_layer(0)
        output = engine.forward(0, tokens.hidden, tokens.ids, tokens.weights)
        assert (engine.recorder._layers[-1].describe is None) == asked
        engine.recorder.collect()
        if not asked:
            wanted = expected_output(experts, tokens.hidden, tokens.ids, tokens.weights, tokens.ids >= 0)
            torch.testing.assert_close(output.double(), wanted, rtol=1e-4, atol=1e-4)
            assert system.planner.placements[0] is placement
    engine.close()


def test_a_token_that_is_no_number_stays_alone() -> None:
    experts = random_experts(6, 0, width=16)
    tokens = random_tokens(0, 40, 6, 2, masked=0.3)
    tokens.hidden[7] = float("nan")
    engine = start([experts], kernel="grouped_mm", record=False)
    engine.use(engine.build_system("x", TokenHarMoEny(threshold=1)))
    output = engine.forward(0, tokens.hidden, tokens.ids, tokens.weights)
    assert output.isnan().any(dim=1).nonzero().view(-1).tolist() == [7]
    assert (output[(tokens.ids < 0).all(dim=1)] == 0).all()
    engine.close()
