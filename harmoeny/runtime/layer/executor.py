"""How a system executes a MoE layer: what is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.exchange.dispatch import count_assignments
from harmoeny.runtime.kernels import make_kernel
from harmoeny.runtime.layer.planner import Planner
from harmoeny.runtime.layer.recorder import Recorder
from harmoeny.runtime.memory.fetch.base import FetchStats, RankMemory
from harmoeny.runtime.memory.host import HostStats
from harmoeny.runtime.memory.waves import Schedule


@dataclass(frozen=True)
class LayerInput:
    """One rank's tokens in one MoE layer.

    Attributes:
        layer: MoE layer in order of execution.
        hidden_TH: ``[num_tokens, hidden_size]``; ranks may differ in num_tokens, and it may be 0.
        expert_ids_TK: int64 ``[num_tokens, top_k]``; a negative id leaves the assignment out.
        routing_weights_TK: ``[num_tokens, top_k]``.
        numbers_TK: int32 ``[num_tokens, top_k]``, which of its expert's assignments on this rank each is; None before
            they are counted, and where that does not number them.
    """

    layer: int
    hidden_TH: Tensor
    expert_ids_TK: Tensor
    routing_weights_TK: Tensor
    numbers_TK: Tensor | None = None


@dataclass(frozen=True)
class LayerResult:
    """What an executor made of a layer on one rank.

    Attributes:
        output_TH: ``[num_tokens, hidden_size]``, the weighted sum of the experts' outputs.
        assignment_S: int64 ``[S]``, the executed assignments (token * top_k + k), in any order; None: all that the
            model itself does not leave out.
        fetch: what moving weights cost.
        padded_tokens: rows that this rank executed besides the plan's, to fill buffers of equal size.
        host: what its host executed.
    """

    output_TH: Tensor
    assignment_S: Tensor | None
    fetch: FetchStats
    padded_tokens: int = 0
    host: HostStats = field(default_factory=HostStats)

    def executed_mask(self, expert_ids_TK: Tensor) -> Tensor:
        """Return bool ``[num_tokens, top_k]``, true where an assignment, of the input's, was executed."""
        if self.assignment_S is None:
            return expert_ids_TK >= 0
        mask = torch.zeros(expert_ids_TK.numel(), dtype=torch.bool, device=self.output_TH.device)
        mask[self.assignment_S] = True
        return mask.view_as(expert_ids_TK)


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
        counts = self.comm.gather_counts(counts_E)
        record.mark()  # plan
        plan = self.planner.plan(given.layer, counts)
        result = self.execute(replace(given, numbers_TK=numbers_TK), counts, plan)
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
            layer, plan.fetch, executed_SE, from_peer=plan.from_peer, senders=plan.senders, grouped=kernel.grouped,
            head_s=head_s, rest_s=rest_s, host_E=None if plan.host is None else plan.host[:, rank],
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
