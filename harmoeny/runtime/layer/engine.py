"""The expert-parallel engine: executes MoE layers under whichever system is selected, phase by phase."""

from __future__ import annotations

from torch import Tensor

from harmoeny.policy import Policy
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.layer.executor import LayerInput, PlanExecutor
from harmoeny.runtime.layer.recorder import Recorder
from harmoeny.runtime.layer.system import System
from harmoeny.runtime.memory.fetch import make_fetcher
from harmoeny.runtime.memory.fetch.base import RankMemory


class ExpertParallel:
    """Runs MoE layers over the ranks of a communicator.

    Attributes:
        memory: the expert weights and device memory that all systems share.
        comm: the collectives.
        recorder: phase times of the layers.
        kept_TK: while :attr:`keep_masks` is set, bool ``[T, K]`` per executed layer, the executed assignments.
    """

    def __init__(self, memory: RankMemory, recorder: Recorder) -> None:
        self.memory = memory
        self.comm: Communicator = memory.comm
        self.recorder = recorder
        self.keep_masks = False
        self.kept_TK: list[Tensor] = []
        self._system: System | None = None

    def build_system(self, name: str, policy: Policy) -> System:
        """Set up one system: its placement, this rank's expert memory, its executor; all ranks do it together.

        Raises:
            ValueError: the system can't run on these ranks.
        """
        placements = [
            policy.place(layer, experts.num_experts, self.comm.world_size)
            for layer, experts in enumerate(self.memory.store.layers)
        ]
        for placement in placements:
            placement.validate()
        system = System(name, policy, placements, make_fetcher(policy, placements, self.memory))
        system.executor = policy.make_executor(self, system) or PlanExecutor(self, system)
        return system

    def use(self, system: System) -> None:
        """Select the system that executes the layers from now on, and bring the slots to its residency."""
        self._system = system
        system.fetcher.prepare()

    def finish(self) -> None:
        """Block until the loads that the selected system left behind are complete."""
        if self._system is not None:
            self._system.fetcher.finish()

    def forward(self, layer: int, hidden_TH: Tensor, expert_ids_TK: Tensor, routing_weights_TK: Tensor) -> Tensor:
        """Execute one MoE layer; all ranks call it together, each with its own tokens.

        The caller opened the layer in the recorder and routed; from here on the phases are marked here.

        Args:
            layer: MoE layer in order of execution.
            hidden_TH: ``[num_tokens, hidden_size]``; ranks may differ in num_tokens, and it may be 0.
            expert_ids_TK: int64 ``[num_tokens, top_k]``; a negative id leaves the assignment out.
            routing_weights_TK: ``[num_tokens, top_k]``.

        Returns:
            ``[num_tokens, hidden_size]``, the weighted sum of the experts' outputs.

        Raises:
            RuntimeError: no system was selected.
        """
        if self._system is None:
            raise RuntimeError("no system selected: call ExpertParallel.use first")
        given = LayerInput(layer, hidden_TH, expert_ids_TK, routing_weights_TK)
        return self._system.executor.forward(given)
