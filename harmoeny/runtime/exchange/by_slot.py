"""The rows of one rank that executes everything itself, without telling the host how many there are of each expert.

Shape letters: T tokens, K top_k, R rows, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange import fused

#: Above all slots.
NO_SLOT = 2**31 - 1


@dataclass(frozen=True)
class SlotRows:
    """Rows in the order of the slots that execute them.

    Attributes:
        rows_RH: ``[R, H]``; those behind the last slot's belong to none.
        row_TK: int64 ``[T, K]``, the row of every assignment; none of them, or the last, where it is left out.
        ends: int32 ``[num_slots]``, one behind the last row of every slot.
    """

    rows_RH: Tensor
    row_TK: Tensor
    ends: Tensor


def slots_by_expert(slots: Mapping[int, int], num_experts: int, device: torch.device) -> Tensor:
    """Return int32 ``[num_experts + 1]``, :data:`NO_SLOT` and then every expert's slot, :data:`NO_SLOT` without one."""
    found = np.full(num_experts + 1, NO_SLOT, dtype=np.int32)
    for expert_id, slot in slots.items():
        found[expert_id + 1] = slot
    return Device.of(device).upload(found)


def rows_by_slot(
    hidden_TH: Tensor, expert_ids_TK: Tensor, slot_of_E: Tensor, num_slots: int, most_rows: int | None = None
) -> SlotRows:
    """Gather rows in the order of slots where every expert has one; of a slot they are in token order.

    Args:
        hidden_TH: ``[T, H]``, at least one token.
        expert_ids_TK: int64 ``[T, K]``; a negative id leaves the assignment out.
        slot_of_E: int32 ``[E + 1]``, :data:`NO_SLOT` and then every expert's slot.
        num_slots: number of slots.
        most_rows: as many are not left out, at most; None: all may be there.
    """
    num_tokens, top_k = expert_ids_TK.shape
    num_rows = num_tokens * top_k if most_rows is None else min(num_tokens * top_k, most_rows)
    if fused.is_available(hidden_TH.device):
        numbers_TK, ends = fused.number_assignments(expert_ids_TK, num_slots, slot_of_E)
        return SlotRows(*fused.spread_tokens(hidden_TH, expert_ids_TK, numbers_TK, slot_of_E, ends, num_rows), ends)
    slot_A = slot_of_E.index_select(0, expert_ids_TK.reshape(-1) + 1)
    # One row more than there are assignments stands for those that are left out.
    slot_R, assignment_R = torch.sort(pad(slot_A, (0, 1), value=NO_SLOT), stable=True)
    device = slot_R.device
    slots = torch.arange(num_slots, dtype=slot_R.dtype, device=device)
    row_R = torch.empty_like(assignment_R).scatter_(0, assignment_R, torch.arange(len(slot_R), device=device))
    return SlotRows(
        rows_RH=hidden_TH.index_select(0, (assignment_R[: num_rows + 1] // top_k).clamp_(max=num_tokens - 1)),
        row_TK=row_R[: num_tokens * top_k].view_as(expert_ids_TK).masked_fill(expert_ids_TK < 0, num_rows),
        ends=torch.searchsorted(slot_R, slots, right=True, out_int32=True),
    )


def sum_by_token(results_RH: Tensor, routing_weights_TK: Tensor, row_TK: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return ``[T, H]``, the results of every token, weighted by the router and added up in one pass.

    Args:
        results_RH: ``[R, H]``, of the rows of :func:`rows_by_slot`.
        routing_weights_TK: ``[T, K]``.
        row_TK: as it made them.
        onto: ``[T, H]``, what they are added to, in place where it has no gaps, and returned; None: nothing.
    """
    if fused.is_available(results_RH.device):
        return fused.add_up(results_RH, routing_weights_TK, row_TK, len(results_RH), onto)
    weights = routing_weights_TK.to(results_RH.dtype)
    last = len(results_RH) - 1
    sums_TH = embedding_bag(row_TK, results_RH, mode="sum", per_sample_weights=weights, padding_idx=last)
    return sums_TH if onto is None else onto.add_(sums_TH)
