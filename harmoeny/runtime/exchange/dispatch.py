"""Bringing assignments to the ranks that the plan names, and their results back: one sort, one all-to-all each way.

Shape letters: T tokens of this rank, K top_k, A = T*K assignments, S rows sent, R rows received, H hidden size,
E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator

#: Above all slots.
NO_SLOT = 2**31 - 1


@dataclass(frozen=True)
class Dispatched:
    """What combine must know of a dispatch.

    Attributes:
        assignment_S: int64 ``[S]``, the assignment (token * K + k) behind every row sent, by destination and expert.
        send_splits: ``[W]``, rows sent to every rank.
        recv_splits: ``[W]``, rows received from every rank.
        grouping_R: int64 ``[R]``, the received row at every position of the order by expert; None where the rows
            arrive in that order.
        num_executed_E: int64 ``[E]`` on the host, rows per expert after grouping.
    """

    assignment_S: Tensor
    send_splits: list[int]
    recv_splits: list[int]
    grouping_R: Tensor | None
    num_executed_E: IntArray


def count_assignments(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """Count this rank's assignments.

    Args:
        expert_ids_TK: int64 ``[T, K]``; a negative id marks an assignment that the model itself leaves out.
        num_experts: number of experts.

    Returns:
        int64 ``[E]``.
    """
    ids = expert_ids_TK.reshape(-1) + 1
    # Unlike bincount, this never asks the device for the largest id.
    return ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[1:]


def dispatch(
    hidden_TH: Tensor,
    expert_ids_TK: Tensor,
    counts: IntArray,
    plan: Plan,
    comm: Communicator,
    order: Sequence[int] | None = None,
) -> tuple[Tensor, Dispatched]:
    """Send this rank's tokens where the plan wants them and group what arrives by expert.

    Args:
        hidden_TH: ``[T, H]``, this rank's tokens.
        expert_ids_TK: int64 ``[T, K]``, the router's choice; negative where the model itself leaves one out.
        counts: int64 ``[W, E]``, what all ranks want executed.
        plan: the same plan on all ranks.
        comm: the collectives.
        order: the experts with rows for this rank, in the order in which it wants their rows; None: ascending.

    Returns:
        ``[R, H]``, the rows to execute, grouped by expert, and what :func:`combine` needs.
    """
    sent_EW = plan.tokens[comm.rank]
    received_WE = plan.tokens[:, :, comm.rank]
    assignment_S = send_order(expert_ids_TK, counts[comm.rank], sent_EW)
    send_splits = sent_EW.sum(axis=0).tolist()
    recv_splits = received_WE.sum(axis=1).tolist()
    # Before the exchange is queued: what is uploaded afterwards would wait for it.
    grouping_R = by_expert(received_WE, comm.device, order)

    rows = comm.exchange_rows(gather_rows(hidden_TH, assignment_S, expert_ids_TK.shape[1]), send_splits, recv_splits)
    if grouping_R is not None:
        rows = rows.index_select(0, grouping_R)
    return rows, Dispatched(assignment_S, send_splits, recv_splits, grouping_R, received_WE.sum(axis=0))


def combine(results_RH: Tensor, routing_weights_TK: Tensor, dispatched: Dispatched, comm: Communicator) -> Tensor:
    """Bring results home and add them up, weighted by the router.

    Args:
        results_RH: ``[R, H]``, in the order in which :func:`dispatch` returned the rows.
        routing_weights_TK: ``[T, K]``.
        dispatched: what :func:`dispatch` returned.
        comm: the collectives.

    Returns:
        ``[T, H]``; assignments that nobody executed contribute nothing.
    """
    rows = results_RH
    if dispatched.grouping_R is not None:
        rows = torch.empty_like(results_RH).index_copy_(0, dispatched.grouping_R, results_RH)
    rows_SH = comm.exchange_rows(rows, dispatched.recv_splits, dispatched.send_splits)
    return weighted_sum(rows_SH, routing_weights_TK, dispatched.assignment_S)


def weighted_sum(rows_SH: Tensor, routing_weights_TK: Tensor, assignment_S: Tensor) -> Tensor:
    """Add up the results of every token, weighted by the router.

    Args:
        rows_SH: ``[S, H]``, results.
        routing_weights_TK: ``[T, K]``.
        assignment_S: int64 ``[S]``, the assignment behind every row; those that are not there contribute nothing.

    Returns:
        ``[T, H]``.
    """
    num_tokens, top_k = routing_weights_TK.shape
    if len(rows_SH) == 0:
        return rows_SH.new_zeros(num_tokens, rows_SH.shape[1])
    # Gathers, weights and adds up in one pass over the rows, in FP32 whatever their type.
    weight_A = routing_weights_TK.to(rows_SH.dtype).reshape(-1)
    if len(rows_SH) == len(weight_A):
        row_A = torch.empty_like(assignment_S)
        row_A.scatter_(0, assignment_S, torch.arange(len(row_A), device=row_A.device))
        first_T = torch.arange(0, len(row_A), top_k, device=row_A.device)
        return embedding_bag(row_A, rows_SH, first_T, mode="sum", per_sample_weights=weight_A)
    executed_S, row_S = torch.sort(assignment_S)
    first_T = torch.searchsorted(executed_S, torch.arange(0, len(weight_A), top_k, device=executed_S.device))
    weight_S = weight_A.index_select(0, executed_S)
    return embedding_bag(row_S, rows_SH, first_T, mode="sum", per_sample_weights=weight_S)


@dataclass(frozen=True)
class SlotOrder:
    """This rank's assignments in the order of the slots that execute them, as the device knows it.

    There is one row more than assignments; it is last, behind the rows of assignments that the model leaves out, and
    belongs to no slot.

    Attributes:
        token_R: int64 ``[T * K + 1]``, the token of every row.
        row_TK: int64 ``[T, K]``, the row of every assignment; the last one where it is left out.
        ends: int32 ``[num_slots]``, one behind the last row of every slot.
    """

    token_R: Tensor
    row_TK: Tensor
    ends: Tensor


def order_by_slot(expert_ids_TK: Tensor, slot_of_E: Tensor, num_slots: int) -> SlotOrder:
    """Order assignments by slot where every expert has one, without telling the host how many there are of each.

    Args:
        expert_ids_TK: int64 ``[T, K]``, at least one token; a negative id leaves the assignment out.
        slot_of_E: int32 ``[E + 1]``, :data:`NO_SLOT` and then every expert's slot.
        num_slots: number of slots.
    """
    num_tokens, top_k = expert_ids_TK.shape
    num_rows = num_tokens * top_k
    slot_A = slot_of_E.index_select(0, expert_ids_TK.reshape(-1) + 1)
    slot_R, assignment_R = torch.sort(pad(slot_A, (0, 1), value=NO_SLOT), stable=True)
    device = slot_R.device
    slots = torch.arange(num_slots, dtype=slot_R.dtype, device=device)
    row_R = torch.empty_like(assignment_R).scatter_(0, assignment_R, torch.arange(num_rows + 1, device=device))
    return SlotOrder(
        token_R=(assignment_R // top_k).clamp_(max=num_tokens - 1),
        row_TK=row_R[:num_rows].view_as(expert_ids_TK).masked_fill(expert_ids_TK < 0, num_rows),
        ends=torch.searchsorted(slot_R, slots, right=True, out_int32=True),
    )


def sum_by_token(rows_RH: Tensor, routing_weights_TK: Tensor, order: SlotOrder) -> Tensor:
    """Return ``[T, H]``, the results ``[R, H]`` of every token, weighted by the router and added up in one pass."""
    weights = routing_weights_TK.to(rows_RH.dtype)
    last = len(rows_RH) - 1
    return embedding_bag(order.row_TK, rows_RH, mode="sum", per_sample_weights=weights, padding_idx=last)


def gather_rows(hidden_TH: Tensor, assignment_S: Tensor, top_k: int) -> Tensor:
    """Return ``[S, H]``, the token of every assignment (token * K + k), int64 ``[S]``; ``hidden_TH``: ``[T, H]``."""
    return hidden_TH.index_select(0, assignment_S if top_k == 1 else assignment_S // top_k)


def by_expert(received_WE: IntArray, device: torch.device, order: Sequence[int] | None = None) -> Tensor | None:
    """Order rows by expert that arrived by (source, expert).

    Args:
        received_WE: int64 ``[W, E]``, rows of every source and expert.
        device: where the order is made.
        order: the experts that have rows, in the order that is wanted; None: ascending.

    Returns:
        int64 ``[R]``, the row at every position of the new order, which is by (expert, source); None where that is the
        order in which they arrived.
    """
    ascending = order is None or all(a < b for a, b in pairwise(order))
    if ascending and np.count_nonzero(received_WE.any(axis=1)) <= 1:
        return None
    starts_WE = _exclusive_cumsum(received_WE.reshape(-1)).reshape(received_WE.shape)
    if not ascending:
        starts_WE, received_WE = starts_WE[:, order], received_WE[:, order]
    return ranges(starts_WE.T, received_WE.T, device)


def send_order(expert_ids_TK: Tensor, counts_E: IntArray, sent_EW: IntArray) -> Tensor:
    """Order this rank's assignments by (destination, expert).

    Of an expert's assignments, in token order, the first ``sent_EW[e, 0]`` go to rank 0, the next to rank 1, and so on;
    what is left over is dropped.

    Args:
        expert_ids_TK: int64 ``[T, K]``; negative ids go nowhere.
        counts_E: int64 ``[E]``, this rank's assignments of every expert.
        sent_EW: int64 ``[E, W]``, how many of them go to every rank.

    Returns:
        int64 ``[S]``, assignments.
    """
    ids = expert_ids_TK.reshape(-1)
    grouped = torch.argsort(ids, stable=True)
    # The masked ids, being negative, come first; what the plan drops of an expert stays between its blocks.
    starts_E = _exclusive_cumsum(counts_E) + (len(ids) - counts_E.sum())
    starts_EW = starts_E[:, None] + _exclusive_cumsum(sent_EW, axis=1)
    return grouped.index_select(0, ranges(starts_EW.T, sent_EW.T, ids.device))


def _exclusive_cumsum(values: IntArray, axis: int = 0) -> IntArray:
    total: IntArray = np.cumsum(values, axis=axis)
    return total - values


def ranges(starts: IntArray, lengths: IntArray, device: torch.device) -> Tensor:
    """Concatenate ``range(start, start + length)`` of all blocks, on the device and without waiting for it.

    Args:
        starts: int64, any shape.
        lengths: int64, the same shape.
        device: where the ranges are made.
    """
    starts, lengths = starts.reshape(-1), lengths.reshape(-1)
    total = int(lengths.sum())
    offsets, repeats = Device.of(device).upload(np.stack([starts - _exclusive_cumsum(lengths), lengths]))
    return torch.repeat_interleave(offsets, repeats, output_size=total) + torch.arange(total, device=device)
