"""The expert-parallel engine: executes MoE layers under whichever system is selected, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harmoeny.placement import Placement
from harmoeny.policy import Policy
from harmoeny.runtime.comm import Communicator
from harmoeny.runtime.dispatch import combine, count_assignments, dispatch, kept_assignments
from harmoeny.runtime.experts import ExpertStore
from harmoeny.runtime.fetch.base import ExpertWork, FetchStrategy
from harmoeny.runtime.fetch.sync import SyncFetch
from harmoeny.runtime.recorder import Recorder


@dataclass(frozen=True)
class System:
    """One system under test on one rank.

    Attributes:
        name: its name in records.
        policy: makes the plans.
        placement: the residency that plans start from, the same in every layer.
        fetcher: this rank's expert memory.
    """

    name: str
    policy: Policy
    placement: Placement
    fetcher: FetchStrategy


class ExpertParallel:
    """Runs MoE layers over the ranks of a communicator.

    Attributes:
        store: the expert weights that all systems share.
        comm: the collectives.
        recorder: phase times of the layers.
        kept_TK: while :attr:`keep_masks` is set, bool ``[T, K]`` per executed layer, the executed assignments.
    """

    def __init__(self, store: ExpertStore, comm: Communicator, recorder: Recorder) -> None:
        self.store = store
        self.comm = comm
        self.recorder = recorder
        self.keep_masks = False
        self.kept_TK: list[Tensor] = []
        self._system: System | None = None

    def build_system(self, name: str, policy: Policy) -> System:
        """Set up one system: its placement and this rank's expert memory."""
        placement = policy.place(0, self.store.layers[0].num_experts, self.comm.world_size)
        placement.validate()
        fetcher = SyncFetch(self.store, placement.resident[:, self.comm.rank], self.comm.device)
        return System(name, policy, placement, fetcher)

    def use(self, system: System) -> None:
        """Select the system that executes the layers from now on."""
        self._system = system

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
        system, record = self._system, self.recorder
        record.mark()  # metadata
        counts = self.comm.gather_counts(count_assignments(expert_ids_TK, system.placement.num_experts))
        record.mark()  # plan
        plan = system.policy.plan(counts, system.placement)
        record.mark()  # dispatch
        rows_RH, dispatched = dispatch(hidden_TH, expert_ids_TK, plan, self.comm)
        record.mark()  # compute
        results_RH = torch.empty_like(rows_RH)
        function = self.store.layers[layer].function

        def execute(item: ExpertWork, weights: Mapping[str, Tensor]) -> None:
            part = slice(item.start, item.start + item.num_tokens)
            function(weights, rows_RH[part], results_RH[part])

        num_E = dispatched.num_executed_E
        starts_E = np.cumsum(num_E) - num_E
        work = [ExpertWork(int(e), int(starts_E[e]), int(num_E[e])) for e in np.flatnonzero(num_E)]
        fetch = system.fetcher.run(layer, work, execute)
        record.mark()  # combine
        output_TH = combine(results_RH, routing_weights_TK, dispatched, self.comm)
        record.mark()  # end
        record.describe(plan, int(counts[self.comm.rank].sum()), fetch)
        if self.keep_masks:
            self.kept_TK.append(kept_assignments(expert_ids_TK, dispatched))
        return output_TH
