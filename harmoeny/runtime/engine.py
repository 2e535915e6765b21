"""The expert-parallel engine: executes MoE layers under whichever system is selected, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from harmoeny.placement import IntArray, Placement
from harmoeny.policy import Policy
from harmoeny.runtime.comm import Communicator
from harmoeny.runtime.dispatch import combine, count_assignments, dispatch, kept_assignments
from harmoeny.runtime.fetch import make_fetcher
from harmoeny.runtime.fetch.base import FetchStrategy, RankMemory
from harmoeny.runtime.recorder import Recorder
from harmoeny.runtime.work import ExpertWork


@dataclass
class System:
    """One system under test on one rank.

    Attributes:
        name: its name in records.
        policy: makes the plans.
        placements: the present residency per MoE layer.
        fetcher: this rank's expert memory.
        history: int64 ``[world_size, num_experts]`` per MoE layer and earlier batch, for policies that place anew.
    """

    name: str
    policy: Policy
    placements: list[Placement]
    fetcher: FetchStrategy
    history: list[list[IntArray]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.history = [[] for _ in self.placements]
        self._places_anew = type(self.policy).update_placement is not Policy.update_placement

    def placement(self, layer: int, counts: IntArray, rank: int) -> Placement:
        """Return the residency to plan a batch with, after the policy had its chance to change it."""
        if self._places_anew:
            changed = self.policy.update_placement(layer, self.history[layer], self.placements[layer])
            self.history[layer].append(counts)
            if changed is not None:
                self.placements[layer] = changed
                self.fetcher.place(layer, changed.resident[:, rank])
        return self.placements[layer]


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
        """Set up one system: its placement and this rank's expert memory; all ranks do it together."""
        placements = [
            policy.place(layer, experts.num_experts, self.comm.world_size)
            for layer, experts in enumerate(self.memory.store.layers)
        ]
        for placement in placements:
            placement.validate()
        return System(name, policy, placements, make_fetcher(policy, placements, self.memory))

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
        system, record, experts = self._system, self.recorder, self.memory.store.layers[layer]
        record.mark()  # metadata
        counts = self.comm.gather_counts(count_assignments(expert_ids_TK, experts.num_experts))
        record.mark()  # plan
        placement = system.placement(layer, counts, self.comm.rank)
        plan = system.policy.plan(counts, placement)
        system.fetcher.begin(layer, plan, work_of(plan.tokens[:, :, self.comm.rank].sum(axis=0)))
        record.mark()  # dispatch
        rows_RH, dispatched = dispatch(hidden_TH, expert_ids_TK, plan, self.comm)
        record.mark()  # compute
        results_RH = torch.empty_like(rows_RH)

        def execute(item: ExpertWork, weights: Mapping[str, Tensor]) -> None:
            part = slice(item.start, item.start + item.num_tokens)
            experts.function(weights, rows_RH[part], results_RH[part])

        fetch = system.fetcher.run(execute)
        record.mark()  # combine
        output_TH = combine(results_RH, routing_weights_TK, dispatched, self.comm)
        record.mark()  # end
        record.describe(plan, int(counts[self.comm.rank].sum()), fetch)
        if self.keep_masks:
            self.kept_TK.append(kept_assignments(expert_ids_TK, dispatched))
        return output_TH


def work_of(executed: IntArray) -> list[ExpertWork]:
    """Return the slices of rows that are grouped by ascending expert; ``executed``: int64 ``[num_experts]``."""
    starts = np.cumsum(executed) - executed
    return [ExpertWork(int(e), int(starts[e]), int(executed[e])) for e in np.flatnonzero(executed)]
