"""Executes some of a rank's own rows while counts travel and the plan is made; :mod:`harmoeny.head_start` says which.

Of an expert's assignments the first, in token order, are early. To whatever comes after, they are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from harmoeny.head_start import HeadStart, early_rows
from harmoeny.placement import IntArray, Placement
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange import fused
from harmoeny.runtime.exchange.by_slot import slots_by_expert, sum_by_token
from harmoeny.runtime.exchange.early import early_by_slot
from harmoeny.runtime.exchange.gather import add_rows, gather_rows
from harmoeny.runtime.exchange.order import Assignments, exclusive_cumsum
from harmoeny.runtime.kernels.base import Kernel, Results
from harmoeny.runtime.kernels.grouped import GroupedKernel
from harmoeny.runtime.layer.layer_input import LayerInput, LayerResult
from harmoeny.runtime.layer.planner import Planner
from harmoeny.runtime.memory.waves import Wave


@dataclass(frozen=True)
class Begun:
    """A layer of which a part is executed, or queued, on this rank.

    Attributes:
        rest: what is left of its input.
        early_ids_TK: int64 ``[num_tokens, top_k]``, the expert of every assignment that is not left, -1 of the others.
        add_onto: adds their results, weighted, onto ``[num_tokens, hidden_size]`` and returns it.
    """

    rest: LayerInput
    early_ids_TK: Tensor
    add_onto: Callable[[Tensor], Tensor]

    def completed(self, result: LayerResult) -> LayerResult:
        """Return the result of the whole layer, of that of the rest."""
        return replace(result, output_TH=self.add_onto(result.output_TH), early_ids_TK=self.early_ids_TK)


class HeadStarts:
    """Begins the layers of one system on one rank."""

    def __init__(self, planner: Planner, kernels: list[Kernel], device: torch.device, rank: int) -> None:
        """Keep what layers are begun with.

        Args:
            planner: knows how much is early, and what the slots hold.
            kernels: compute the layers' experts.
            device: where tokens are.
            rank: this one.
        """
        self._planner, self._kernels, self._device, self._rank = planner, kernels, device, rank
        self._slots: dict[int, tuple[Placement, Tensor]] = {}

    def begin(self, given: LayerInput, counts_E: Tensor, head_start: HeadStart) -> Begun | None:
        """Execute the early part of a layer; None: there is none, if no token goes to an expert twice.

        Args:
            given: this rank's tokens.
            counts_E: int64 ``[num_experts]``, their assignments.
            head_start: how much all ranks execute early.
        """
        if len(given.hidden_TH) < head_start.least_rows:
            return None
        kernel = self._kernels[given.layer]
        if isinstance(kernel, GroupedKernel):
            return self._queue(kernel, given, counts_E, head_start)
        return self._execute(kernel, given, counts_E, head_start)

    def _execute(self, kernel: Kernel, given: LayerInput, counts_E: Tensor, head_start: HeadStart) -> Begun | None:
        """Execute one expert after another; on CUDA the host waits for this rank's own counts to tell it which."""
        device, placement = Device.of(self._device), self._planner.placements[given.layer].routed
        counts: IntArray = device.download(counts_E)()
        own = np.ascontiguousarray(placement.resident[:, self._rank, None])
        early_E = np.zeros_like(counts)
        early_E[: len(own)] = early_rows(counts[None, : len(own)], own, head_start)[0]
        expert_ids = np.flatnonzero(early_E).tolist()
        if not expert_ids:
            return None
        fetcher = self._planner.fetcher
        residents = fetcher.residents(given.layer)
        slots = [residents[expert_id] for expert_id in expert_ids]
        fetcher.await_residents(given.layer, slots)
        assignments = Assignments(given.expert_ids_TK, counts, given.numbers_TK)
        rows_RH, sent = gather_rows(given.hidden_TH, assignments, early_E[:, None])
        num_tokens, results = early_E[expert_ids], Results(rows_RH)
        starts = exclusive_cumsum(num_tokens).tolist()
        kernel(Wave(0, 0, expert_ids, [slot.index for slot in slots], starts, num_tokens.tolist()), rows_RH, results)

        def add_onto(output_TH: Tensor) -> Tensor:
            return add_rows(results.rows(), given.routing_weights_TK, sent, output_TH)

        if given.numbers_TK is None:
            is_early_TK = torch.zeros_like(given.expert_ids_TK, dtype=torch.bool)
            is_early_TK.view(-1)[sent.assignment_S] = True
            early_ids_TK, rest_ids_TK = (
                given.expert_ids_TK.masked_fill(mask, -1) for mask in (~is_early_TK, is_early_TK)
            )
            return Begun(replace(given, expert_ids_TK=rest_ids_TK), early_ids_TK, add_onto)
        early_ids_TK, rest_ids_TK, numbers_TK = fused.split_early(
            given.expert_ids_TK, given.numbers_TK, device.upload(early_E)
        )
        rest = replace(given, expert_ids_TK=rest_ids_TK, numbers_TK=numbers_TK)
        return Begun(rest, early_ids_TK, add_onto)

    def _queue(self, kernel: GroupedKernel, given: LayerInput, counts_E: Tensor, head_start: HeadStart) -> Begun:
        """Choose and execute on the device, which the host does not wait for; all rows with one call."""
        fetcher, placement = self._planner.fetcher, self._planner.placements[given.layer]
        early = early_by_slot(
            given.hidden_TH, given.expert_ids_TK, given.numbers_TK, counts_E, self._slot_by_expert(given.layer),
            placement.num_experts - placement.num_shared, len(kernel.slots.slots), head_start,
        )  # fmt: skip
        # Which of them are read, the device alone knows.
        fetcher.await_residents(given.layer, fetcher.residents(given.layer).values())
        results_RH = kernel.apply(early.by_slot.rows_RH, early.by_slot.ends)

        def add_onto(output_TH: Tensor) -> Tensor:
            return sum_by_token(results_RH, given.routing_weights_TK, early.by_slot.row_TK, onto=output_TH)

        rest = replace(given, expert_ids_TK=early.rest_ids_TK, numbers_TK=early.rest_numbers_TK)
        return Begun(rest, early.early_ids_TK, add_onto)

    def _slot_by_expert(self, layer: int) -> Tensor:
        """Return the slots of what this rank holds by the present placement; they go to the device when it changes."""
        placement = self._planner.placements[layer]
        known = self._slots.get(layer)
        if known is None or known[0] is not placement:
            slots = {e: slot.index for e, slot in self._planner.fetcher.residents(layer).items()}
            known = self._slots[layer] = placement, slots_by_expert(slots, placement.num_experts, self._device)
        return known[1]
