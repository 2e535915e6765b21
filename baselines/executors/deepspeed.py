"""DeepSpeed's MoE layer as an executor; the library, whose import takes seconds, is imported when one is built.

Shape letters: T tokens of this rank, K top_k, S executed assignments of this rank, E experts, H hidden size.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from harmoeny.choices import KernelName
from harmoeny.modelled import PadsBuffers
from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.order import Assignments, ranges, send_order
from harmoeny.runtime.layer.executor import Executor, LayerInput, LayerResult
from harmoeny.runtime.layer.planner import Planner
from harmoeny.runtime.layer.recorder import Recorder
from harmoeny.runtime.memory.experts import ExpertFunction
from harmoeny.runtime.memory.fetch.base import FetchStats, RankMemory
from harmoeny.runtime.memory.slots import Slot

if TYPE_CHECKING:
    from deepspeed.moe.layer import MoE


class _Expert(nn.Module):
    """One of our experts. It has no parameters of its own: it reads the slot that all systems share."""

    slot: Slot

    def __init__(self, function: ExpertFunction) -> None:
        super().__init__()
        self.function = function

    def forward(self, rows: Tensor) -> Tensor:
        """Apply the expert to ``[..., H]``."""
        flat = rows.reshape(-1, rows.shape[-1])
        out = torch.empty_like(flat)
        self.function(self.slot.weights, flat, out)
        return out.view(rows.shape)


class _Gate(nn.Module):
    """Gives DeepSpeed's layer the routes of the batch, where its own gate would choose them."""

    #: Loss, capacity, number of experts, then per assignment ``[K, T]`` expert, position and weight, then counts.
    routes: tuple[Tensor, int, int, Tensor, Tensor, Tensor, Tensor]

    def forward(self, *_: Any) -> tuple[Tensor, int, int, Tensor, Tensor, Tensor, Tensor]:
        """Return the routes, whatever the tokens."""
        return self.routes


@dataclass(frozen=True)
class _Layer:
    """DeepSpeed's module for one MoE layer.

    Attributes:
        module: the module.
        gate: its gate.
        order_E: int64 ``[E]``, our expert at every position of DeepSpeed's order, which is by rank.
    """

    module: MoE
    gate: _Gate
    order_E: IntArray


class DeepSpeedExecutor(Executor):
    """Dispatches, executes and combines with DeepSpeed's own code."""

    def __init__(self, planner: Planner, memory: RankMemory, recorder: Recorder) -> None:
        """Build DeepSpeed's layers; all ranks do it together.

        Args:
            planner: its policy gives the rows that a rank sends an expert; its placements hold equally many experts per
                rank.
            memory: the expert weights and the communicator of this rank.
            recorder: phase times of the layers.

        Raises:
            ValueError: the policy does not say how many rows a rank sends.
        """
        super().__init__(planner, memory, recorder)
        if not isinstance(planner.policy, PadsBuffers):
            raise ValueError(f"executor: {planner.policy.executor!r}, must go with a policy that has a capacity")
        self._capacity = planner.policy.capacity
        if not Device.of(self.comm.device).has_own_memory:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when the library is imported
        import deepspeed

        if self.comm.world_size > 1:
            # Else it compiles kernels for all-reduces on a CPU, which a MoE layer has none of.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            deepspeed.comm.init_distributed(dist_backend=self.comm.backend, verbose=False)
        self._layers = [self._build(layer) for layer in range(len(planner.placements))]

    @property
    def kernel(self) -> str:
        """The library computes its experts one after another."""
        return str(KernelName.LOOP)

    def _build(self, layer: int) -> _Layer:
        from deepspeed.moe.layer import MoE

        experts, world_size = self.memory.store.layers[layer], self.comm.world_size

        def function(weights: Mapping[str, Tensor], rows: Tensor, out: Tensor) -> None:
            # The library copies its experts deeply, and with a method that the function refers to the whole model.
            experts.function(weights, rows, out)

        order_E = np.argsort(self.planner.placements[layer].home, kind="stable").astype(np.int64)
        own = order_E.reshape(world_size, -1)[self.comm.rank]
        slots = self.planner.fetcher.residents(layer)
        with contextlib.redirect_stdout(io.StringIO()):  # it reports every process group
            module = MoE(experts.hidden_size, _Expert(function), experts.num_experts, world_size)
            if world_size > 1:
                module.set_deepspeed_parallelism()
        inner = module.deepspeed_moe
        inner.gate = _Gate()
        for expert_id, expert in zip(own.tolist(), inner.experts.deepspeed_experts, strict=True):
            expert.slot = slots[expert_id]
        inner.experts.register_forward_pre_hook(lambda *_: self.recorder.mark())  # compute
        inner.experts.register_forward_hook(lambda *_: self.recorder.mark())  # combine
        return _Layer(module, inner.gate, order_E)

    def execute(self, given: LayerInput, counts: IntArray, plan: Plan) -> LayerResult:
        """Carry out a plan that sends every expert's assignments home, as many as the capacity lets through."""
        layer, num_experts = self._layers[given.layer], plan.num_experts
        capacity = self._capacity(counts)
        sent_EW = plan.tokens[self.comm.rank]
        assignment_S = send_order(Assignments(given.expert_ids_TK, counts[self.comm.rank]), sent_EW)
        sent_E = sent_EW.sum(axis=1)[layer.order_E]
        device = self.comm.device
        expert_S = Device.of(device).upload(np.repeat(np.arange(num_experts), sent_E))
        position_S = ranges(np.zeros_like(sent_E), sent_E, device)
        layer.gate.routes = (
            given.hidden_TH.new_zeros(()),
            capacity,
            num_experts,
            _by_assignment(given.expert_ids_TK, assignment_S, expert_S),
            _by_assignment(given.expert_ids_TK, assignment_S, position_S),
            given.routing_weights_TK.t().float(),
            torch.from_numpy(sent_E),
        )
        self.recorder.mark()  # dispatch
        output_TH, _, _ = layer.module(given.hidden_TH)
        padded = capacity * num_experts - int(plan.tokens[:, :, self.comm.rank].sum())
        return LayerResult(output_TH, assignment_S, FetchStats(), padded)


def _by_assignment(expert_ids_TK: Tensor, assignment_S: Tensor, values_S: Tensor) -> Tensor:
    """Return int64 ``[K, T]``, the value of every executed assignment, and -1 for the others."""
    values = torch.full((expert_ids_TK.numel(),), -1, device=expert_ids_TK.device)
    values[assignment_S] = values_S
    return values.view_as(expert_ids_TK).t().contiguous()
