"""What an executor gets of a layer, and what it makes of it, on one rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from harmoeny.runtime.memory.fetch.base import FetchStats
from harmoeny.runtime.memory.host import HostStats


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
        early_ids_TK: int64 ``[num_tokens, top_k]``, the expert of every assignment that was executed before there was a
            plan, -1 of the others; None: there is none.
    """

    output_TH: Tensor
    assignment_S: Tensor | None
    fetch: FetchStats
    padded_tokens: int = 0
    host: HostStats = field(default_factory=HostStats)
    early_ids_TK: Tensor | None = None

    def executed_mask(self, expert_ids_TK: Tensor) -> Tensor:
        """Return bool ``[num_tokens, top_k]``, true where an assignment, of the input's, was executed."""
        if self.assignment_S is None:
            return expert_ids_TK >= 0
        mask = torch.zeros(expert_ids_TK.numel(), dtype=torch.bool, device=self.output_TH.device)
        mask[self.assignment_S] = True
        mask_TK = mask.view_as(expert_ids_TK)
        return mask_TK if self.early_ids_TK is None else mask_TK | (self.early_ids_TK >= 0)
