"""The expert-parallel engine: executes MoE layers under whichever system is selected, phase by phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from harmoeny.policy import Policy, moves_shared
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.executor import LayerInput, LayerResult
from harmoeny.runtime.layer.plan_executor import find_executor
from harmoeny.runtime.layer.planner import Planner
from harmoeny.runtime.layer.recorder import Recorder
from harmoeny.runtime.layer.system import System
from harmoeny.runtime.memory.experts import LayerExperts
from harmoeny.runtime.memory.fetch import make_fetcher
from harmoeny.runtime.memory.fetch.base import RankMemory

#: Is shown what a layer got and what came out.
LayerObserver = Callable[[LayerInput, LayerResult], None]


class ExpertParallel:
    """Runs MoE layers over the ranks of a communicator.

    Attributes:
        memory: the expert weights and device memory that all systems share.
        comm: the collectives.
        recorder: phase times of the layers.
    """

    def __init__(self, memory: RankMemory, recorder: Recorder, resources: ExitStack | None = None) -> None:
        """Use :func:`harmoeny.runtime.start.start_rank`.

        Args:
            memory: the expert weights and device memory.
            recorder: phase times.
            resources: what :meth:`close` lets go of.
        """
        self.memory = memory
        self.comm: Communicator = memory.comm
        self.recorder = recorder
        self._system: System | None = None
        self._masks_TK: list[Tensor] | None = None
        self._observer: LayerObserver | None = None
        self._resources = resources or ExitStack()

    def build_system(self, name: str, policy: Policy) -> System:
        """Set up one system: its placement, this rank's expert memory, its executor; all ranks do it together.

        Raises:
            ValueError: the system can't run on these ranks.
        """
        layers, world_size = self.memory.store.layers, self.comm.world_size
        policy.validate_ranks(layers[0].num_routed, world_size)
        if moves_shared(type(policy)) and not any(experts.num_shared for experts in layers):
            raise ValueError(f"{name}: must go with a model that hands its shared experts to the runtime")
        if policy.needs_host and self.memory.host is None:
            raise ValueError(f"host_threads: 0, must be at least 1 for {name}, which computes on the host")
        placements = [
            policy.place(layer, experts.num_routed, world_size).with_shared(experts.num_shared)
            for layer, experts in enumerate(layers)
        ]
        for placement in placements:
            placement.validate(complete=not policy.caches)
        make_executor = find_executor(policy.executor)
        planner = Planner(policy, placements, make_fetcher(policy, placements, self.memory))
        return System(name, planner, make_executor(planner, self.memory, self.recorder))

    def use(self, system: System) -> None:
        """Select the system that executes the layers from now on, and bring the slots to its residency."""
        self._system = system
        system.fetcher.prepare()

    def finish(self) -> None:
        """Block until the copies that the selected system left behind are complete."""
        if self._system is not None:
            self._system.fetcher.finish()

    def close(self) -> None:
        """Block until no copy is under way, and let go of what was started for this rank; nothing runs afterwards."""
        self.finish()
        self._resources.close()

    @contextmanager
    def executed_masks(self) -> Iterator[list[Tensor]]:
        """Collect, from every layer that runs meanwhile, bool ``[num_tokens, top_k]``: the executed assignments.

        Shared experts are not among them.
        """
        masks_TK: list[Tensor] = []
        self._masks_TK = masks_TK
        try:
            yield masks_TK
        finally:
            self._masks_TK = None

    @contextmanager
    def observed(self, observer: LayerObserver) -> Iterator[None]:
        """Show every layer that runs meanwhile to ``observer``; for checks, never while anything is timed."""
        self._observer = observer
        try:
            yield
        finally:
            self._observer = None

    def forward(
        self,
        layer: int,
        hidden_TH: Tensor,
        expert_ids_TK: Tensor,
        routing_weights_TK: Tensor,
        shared_weights_T: Tensor | None = None,
    ) -> Tensor:
        """Execute one MoE layer; all ranks call it together, each with its own tokens.

        The caller opened the layer in the recorder and routed; from here on the phases are marked here.

        Args:
            layer: MoE layer in order of execution.
            hidden_TH: ``[num_tokens, hidden_size]``; ranks may differ in num_tokens, and it may be 0.
            expert_ids_TK: int64 ``[num_tokens, top_k]``; a negative id leaves the assignment out.
            routing_weights_TK: ``[num_tokens, top_k]``.
            shared_weights_T: ``[num_tokens]``, weights of the layer's shared experts, if it has any; None: 1.

        Returns:
            ``[num_tokens, hidden_size]``, the weighted sum of the experts' outputs.

        Raises:
            RuntimeError: no system was selected.
        """
        if self._system is None:
            raise RuntimeError("no system selected: call ExpertParallel.use first")
        given = LayerInput(layer, hidden_TH, expert_ids_TK, routing_weights_TK)
        experts = self.memory.store.layers[layer]
        if experts.num_shared:
            given = _with_shared(given, experts, shared_weights_T)
        result = self._system.executor.forward(given)
        if self._observer is not None:
            self._observer(given, result)
        if self._masks_TK is not None:
            self._masks_TK.append(result.executed_mask(given.expert_ids_TK)[:, : expert_ids_TK.shape[1]])
        return result.output_TH


def _with_shared(given: LayerInput, experts: LayerExperts, weights_T: Tensor | None) -> LayerInput:
    """Add an assignment to every shared expert for each token."""
    num_tokens, num_shared = len(given.hidden_TH), experts.num_shared
    shared = torch.arange(experts.num_routed, experts.num_experts, device=given.expert_ids_TK.device)
    weights = given.routing_weights_TK
    added = weights.new_ones(num_tokens) if weights_T is None else weights_T.to(weights.dtype)
    return replace(
        given,
        expert_ids_TK=torch.cat([given.expert_ids_TK, shared.expand(num_tokens, -1)], dim=1),
        routing_weights_TK=torch.cat([weights, added[:, None].expand(-1, num_shared)], dim=1),
    )
