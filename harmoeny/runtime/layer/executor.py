"""How a system executes a MoE layer: what is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.exchange.dispatch import count_assignments
from harmoeny.runtime.kernels import make_kernel
from harmoeny.runtime.layer.head_start import HeadStarts
from harmoeny.runtime.layer.layer_input import LayerInput, LayerResult
from harmoeny.runtime.layer.planner import Planner
from harmoeny.runtime.layer.recorder import Recorder
from harmoeny.runtime.memory.fetch.base import RankMemory
from harmoeny.runtime.memory.waves import Schedule

__all__ = ["Executor", "LayerInput", "LayerResult"]


class Executor(ABC):
    """Executes the MoE layers of one system on one rank, phase by phase."""

    def __init__(self, planner: Planner, memory: RankMemory, recorder: Recorder) -> None:
        """Keep what the layers are executed with; all ranks do it together.

        Args:
            planner: the system's policy, placements and fetcher.
            memory: the expert weights and the communicator of this rank.
            recorder: phase times of the layers.

        Raises:
            ValueError: the system can't run on these ranks, or the kernel can't compute its experts.
        """
        self.planner = planner
        self.memory = memory
        self.comm = memory.comm
        self.recorder = recorder
        filled = planner.fetcher.fills_slots
        self.kernels = [
            make_kernel(memory.kernel, slots, filled=filled) for slots in planner.fetcher.memory.pool.layers
        ]

        self._head_starts = HeadStarts(planner, self.kernels, self.comm.device, self.comm.rank)
        if any(kernel.grouped for kernel in self.kernels):
            planner.fetcher.follow_slots()

    @property
    def kernel(self) -> str:
        """What computes the experts, for the records; layers may differ."""
        return "+".join(sorted({str(kernel.name) for kernel in self.kernels}))

    def forward(self, given: LayerInput) -> LayerResult:
        """Execute one MoE layer; all ranks call it together, each with its own tokens.

        The caller opened the layer in the recorder and routed; from here on the phases are marked here.
        """
        record, num_experts = self.recorder, self.memory.store.layers[given.layer].num_experts
        record.mark()  # metadata
        counts_E, numbers_TK = count_assignments(given.expert_ids_TK, num_experts)
        given, begun, early = replace(given, numbers_TK=numbers_TK), None, None
        head_start = self.planner.head_start(given.layer)
        if head_start is None:
            counts = self.comm.gather_counts(counts_E)
        else:
            gathered = self.comm.begin_counts(counts_E)
            begun = self._head_starts.begin(given, counts_E, head_start)
            counts = gathered()
            early = self.planner.early(given.layer, counts)
            begins = early is not None and bool(early[self.comm.rank].any())
            assert begun is not None or not begins, "a token goes to an expert twice"
        record.mark()  # plan
        plan = self.planner.plan(given.layer, counts, early)
        rest = counts if early is None else counts - early
        result = self.execute(given if begun is None else begun.rest, rest, plan)
        if begun is not None:
            result = begun.completed(result)
        record.mark()  # end
        record.describe(plan, int(counts[self.comm.rank].sum()), result.fetch, result.padded_tokens, result.host)
        return result

    def begin(self, layer: int, plan: Plan, executed_SE: IntArray) -> Schedule:
        """Order this rank's work of a plan, prepare the kernel for it, and start the fetches whose slots are free.

        Args:
            layer: MoE layer in order of execution.
            plan: the plan.
            executed_SE: int64 ``[num_stages, num_experts]``, what this rank executes of it, by stage of the exchange.
        """
        kernel, rank = self.kernels[layer], self.comm.rank
        head_s = rest_s = 0.0
        if plan.fetch[:, rank].any():
            head_s, rest_s = self.memory.cost.head_s(plan.tokens.sum(axis=1), rank, plan.first_traffic())
        schedule = self.planner.fetcher.begin(
            layer, plan.fetch, executed_SE, from_peer=plan.from_peer, senders=plan.senders, halved=plan.halved,
            grouped=kernel.grouped, head_s=head_s, rest_s=rest_s,
            host_E=None if plan.host is None else plan.host[:, rank],
        )  # fmt: skip
        kernel.begin(schedule)
        return schedule

    @abstractmethod
    def execute(self, given: LayerInput, counts: IntArray, plan: Plan) -> LayerResult:
        """Carry out the plan.

        It is called in the phase ``plan`` and marks the beginning of ``dispatch``, ``compute`` and ``combine``.

        Args:
            given: this rank's tokens.
            counts: int64 ``[world_size, num_experts]``, what was planned.
            plan: the same on all ranks.
        """
