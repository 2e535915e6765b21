"""The standard executor, which carries out any plan, and how a policy's executor is found by name."""

from __future__ import annotations

from importlib import import_module

import numpy as np
from torch import Tensor

from harmoeny.choices import PLAN_EXECUTOR
from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.exchange.by_slot import rows_by_slot, slots_by_expert, sum_by_token
from harmoeny.runtime.exchange.dispatch import combine, dispatch
from harmoeny.runtime.kernels.base import Results
from harmoeny.runtime.kernels.grouped import GroupedKernel
from harmoeny.runtime.layer.executor import Executor, LayerInput, LayerResult
from harmoeny.runtime.layer.planner import Planner
from harmoeny.runtime.layer.recorder import Recorder
from harmoeny.runtime.layer.staged import execute_in_stages
from harmoeny.runtime.memory.fetch.base import FetchStats, RankMemory
from harmoeny.runtime.memory.host import HostStats


class PlanExecutor(Executor):
    """The standard: all tokens are dispatched, then all experts executed, then all results combined.

    A plan that groups its sources or its experts is carried out in stages that overlap, see
    :func:`harmoeny.runtime.layer.staged.execute_in_stages`.

    One rank without a host that holds every expert executes everything itself, whatever the policy: with a grouped
    kernel it does so without a plan, which would need the counts on the host. The plan is made when the records are
    collected.
    """

    def __init__(self, planner: Planner, memory: RankMemory, recorder: Recorder) -> None:
        """Keep what the layers are executed with; see :class:`Executor`."""
        super().__init__(planner, memory, recorder)
        alone = self.comm.world_size == 1 and memory.host is None
        decides_nothing = alone and planner.policy.exact and not planner.places_anew
        as_it_is = type(self).execute is PlanExecutor.execute
        self._slots_of = [
            self._slot_by_expert(layer) if decides_nothing and as_it_is and isinstance(kernel, GroupedKernel) else None
            for layer, kernel in enumerate(self.kernels)
        ]

    def forward(self, given: LayerInput) -> LayerResult:
        """Execute one MoE layer, without a plan where there is nothing to decide."""
        kernel, slot_of_E = self.kernels[given.layer], self._slots_of[given.layer]
        if slot_of_E is None or len(given.hidden_TH) == 0:
            return super().forward(given)
        assert isinstance(kernel, GroupedKernel)
        for _ in ("metadata", "plan", "dispatch"):
            self.recorder.mark()
        by_slot = rows_by_slot(given.hidden_TH, given.expert_ids_TK, slot_of_E, len(kernel.slots.slots))
        self.recorder.mark()  # compute
        results_RH = kernel.apply(by_slot.rows_RH, by_slot.ends)
        self.recorder.mark()  # combine
        output_TH = sum_by_token(results_RH, given.routing_weights_TK, by_slot.row_TK)
        self.recorder.mark()  # end
        self._describe(given.layer, by_slot.ends)
        return LayerResult(output_TH, None, FetchStats())

    def _describe(self, layer: int, ends: Tensor) -> None:
        """Record the plan that was carried out, or make it at once where a guard wants to see it."""

        def describe() -> tuple[Plan, int]:
            tokens_by_slot = ends.diff(prepend=ends.new_zeros(1)).cpu().numpy()
            counts = np.zeros((1, self.memory.store.layers[layer].num_experts), dtype=np.int64)
            for expert_id, slot in self.planner.fetcher.residents(layer).items():
                counts[0, expert_id] = tokens_by_slot[slot.index]
            return self.planner.plan(layer, counts), int(counts.sum())

        if self.planner.guard is None:
            self.recorder.describe_later(describe)
        else:
            self.recorder.describe(*describe(), FetchStats())

    def _slot_by_expert(self, layer: int) -> Tensor | None:
        """Return the slot of every expert, as :func:`rows_by_slot` wants it; None where one has none."""
        residents, num_experts = self.planner.fetcher.residents(layer), self.memory.store.layers[layer].num_experts
        if len(residents) < num_experts:
            return None
        slots = {expert_id: slot.index for expert_id, slot in residents.items()}
        return slots_by_expert(slots, num_experts, self.comm.device)

    def execute(self, given: LayerInput, counts: IntArray, plan: Plan) -> LayerResult:
        """Carry out any plan, with the system's fetch strategy."""
        if plan.source_groups is not None or plan.stages is not None:
            return execute_in_stages(self, given, counts, plan)
        kernel, fetcher = self.kernels[given.layer], self.planner.fetcher
        executed_SE = plan.tokens[:, :, self.comm.rank].sum(axis=0)[None]
        schedule = self.begin(given.layer, plan, executed_SE)
        self.recorder.mark()  # dispatch
        order, held_WE = (
            (schedule.experts_by_row(), fetcher.slot_order(given.layer)) if kernel.grouped else (None, None)
        )
        rows_RH, dispatched = dispatch(
            given.hidden_TH, given.expert_ids_TK, counts, plan, self.comm, order, given.numbers_TK, held_WE
        )
        self.recorder.mark()  # compute
        results = Results(rows_RH)
        host = self.memory.host if schedule.host else None
        if host is not None:
            host.start(self.memory.store.layers[given.layer], schedule.host, rows_RH, results.rows())
        fetch = fetcher.run(lambda wave: kernel(wave, rows_RH, results))
        on_host = HostStats() if host is None else host.finish()
        self.recorder.mark()  # combine
        output_TH = combine(results.rows(), given.routing_weights_TK, dispatched)
        return LayerResult(output_TH, dispatched.sent.assignment_S, fetch, host=on_host)


def find_executor(name: str) -> type[Executor]:
    """Return the executor that a policy names.

    Args:
        name: ``plan``, or an import path: module, colon, class.

    Raises:
        ValueError: there is no such executor.
    """
    if name == PLAN_EXECUTOR:
        return PlanExecutor
    refused = f"executor: {name!r}, must be {PLAN_EXECUTOR} or the import path of an Executor"
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(import_module(module_name), class_name, None)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{refused} ({error})") from error
    if not (isinstance(found, type) and issubclass(found, Executor)):
        raise ValueError(f"{refused} ({module_name} has no such class)")
    return found
