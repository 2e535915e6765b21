"""A rank's early rows where a kernel takes all at once: chosen and gathered on the device, unknown to the host.

Shape letters: T tokens of this rank, K top_k, H hidden size, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harmoeny.head_start import HeadStart
from harmoeny.runtime.exchange import fused
from harmoeny.runtime.exchange.by_slot import NO_SLOT, SlotRows, rows_by_slot


@dataclass(frozen=True)
class EarlyRows:
    """A rank's assignments, divided in two.

    Attributes:
        early_ids_TK: int64 ``[T, K]``, the expert of those that are early: of every expert the first, in token order.
        rest_ids_TK: int64 ``[T, K]``, that of the others; -1 in both where an assignment is not among them.
        rest_numbers_TK: int32 ``[T, K]``, numbers of the others anew; None where they were not numbered.
        by_slot: rows of the early ones.
    """

    early_ids_TK: Tensor
    rest_ids_TK: Tensor
    rest_numbers_TK: Tensor | None
    by_slot: SlotRows


def early_by_slot(
    hidden_TH: Tensor, expert_ids_TK: Tensor, numbers_TK: Tensor | None, counts_E: Tensor, slot_of_E: Tensor,
    num_routed: int, num_slots: int, head_start: HeadStart,
) -> EarlyRows:  # fmt: skip
    """Divide a rank's assignments, and gather the early ones, without waiting for the device.

    Args:
        hidden_TH: ``[T, H]``, at least one token.
        expert_ids_TK: int64 ``[T, K]``; a negative id leaves the assignment out.
        numbers_TK: int32 ``[T, K]``, as :func:`~harmoeny.runtime.exchange.dispatch.count_assignments` returns it.
        counts_E: int64 ``[E]``, likewise.
        slot_of_E: int32 ``[E + 1]``, :data:`NO_SLOT` and then the slot of every expert, :data:`NO_SLOT` where this rank
            does not hold it.
        num_routed: experts that are not shared, which come first.
        num_slots: number of slots.
        head_start: how much is early.
    """
    if numbers_TK is not None:  # where passes are fused
        early_E, ends = fused.choose_early(counts_E, slot_of_E, num_routed, num_slots, head_start)
        early_ids_TK, rest_ids_TK, rest_numbers_TK = fused.split_early(expert_ids_TK, numbers_TK, early_E)
        num_rows = min(expert_ids_TK.numel(), head_start.most_rows)
        # Early assignments have the first numbers of their experts, so that these are theirs among themselves, too.
        rows = fused.spread_tokens(hidden_TH, early_ids_TK, numbers_TK, slot_of_E, ends, num_rows)
        return EarlyRows(early_ids_TK, rest_ids_TK, rest_numbers_TK, SlotRows(*rows, ends))
    resident_E = slot_of_E[1 : num_routed + 1] != NO_SLOT
    early_of = torch.zeros_like(slot_of_E, dtype=counts_E.dtype)
    early_of[1 : num_routed + 1] = choose_early(counts_E[:num_routed], resident_E, head_start)
    early_of_TK = early_of.index_select(0, expert_ids_TK.reshape(-1) + 1).view_as(expert_ids_TK)
    is_early_TK = number_assignments(expert_ids_TK) < early_of_TK
    early_ids_TK = expert_ids_TK.masked_fill(~is_early_TK, -1)
    by_slot = rows_by_slot(hidden_TH, early_ids_TK, slot_of_E, num_slots, most_rows=head_start.most_rows)
    return EarlyRows(early_ids_TK, expert_ids_TK.masked_fill(is_early_TK, -1), None, by_slot)


def choose_early(counts_E: Tensor, resident_E: Tensor, head_start: HeadStart) -> Tensor:
    """Choose for one rank what :func:`harmoeny.head_start.early_rows` chooses, by PyTorch's calls.

    Args:
        counts_E: int64 ``[E]``, assignments of this rank's tokens, shared experts left out.
        resident_E: bool ``[E]``, what it holds.
        head_start: how much.

    Returns:
        int64 ``[E]``.
    """
    most_rows, slice_rows, least_rows, tile_rows, batch_rows = head_start
    whole_E = counts_E // tile_rows * tile_rows * resident_E
    rows, order = torch.sort(whole_E, descending=True, stable=True)
    # Rows in order fall, and so does what is left for them: after the first that are too few, all are.
    taken = rows + slice_rows
    left = (most_rows - slice_rows - taken.cumsum(0) + taken) // tile_rows * tile_rows
    early = torch.minimum(rows, left)
    early *= (early >= least_rows) & (counts_E.sum() <= batch_rows)
    return torch.empty_like(early).scatter_(0, order, early)


def number_assignments(expert_ids_TK: Tensor) -> Tensor:
    """Return int64 ``[T, K]``, which of its expert's assignments each is, in token order, by PyTorch's calls.

    Args:
        expert_ids_TK: int64 ``[T, K]``; those below 0, all alike, are numbered as one expert's.
    """
    ids, order = torch.sort(expert_ids_TK.reshape(-1), stable=True)
    number = torch.arange(len(ids), device=ids.device) - torch.searchsorted(ids, ids)
    return torch.empty_like(number).scatter_(0, order, number).view_as(expert_ids_TK)
