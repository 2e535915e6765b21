"""Bringing assignments to the ranks that the plan names, and their results back: one sort, one all-to-all each way.

Shape letters: T tokens of this rank, K top_k, A = T*K assignments, S rows sent, R rows received, H hidden size,
E experts, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.exchange.comm import Communicator


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
    return torch.bincount(expert_ids_TK.reshape(-1) + 1, minlength=num_experts + 1)[1:]


def dispatch(hidden_TH: Tensor, expert_ids_TK: Tensor, plan: Plan, comm: Communicator) -> tuple[Tensor, Dispatched]:
    """Send this rank's tokens where the plan wants them and group what arrives by expert.

    Args:
        hidden_TH: ``[T, H]``, this rank's tokens.
        expert_ids_TK: int64 ``[T, K]``, the router's choice; negative where the model itself leaves one out.
        plan: the same plan on all ranks.
        comm: the collectives.

    Returns:
        ``[R, H]``, the rows to execute, grouped by ascending expert, and what :func:`combine` needs.
    """
    top_k = expert_ids_TK.shape[1]
    sent_EW = plan.tokens[comm.rank]
    received_WE = plan.tokens[:, :, comm.rank]
    assignment_S = send_order(expert_ids_TK, sent_EW)
    send_splits = [int(n) for n in sent_EW.sum(axis=0)]
    recv_splits = [int(n) for n in received_WE.sum(axis=1)]

    rows = comm.exchange_rows(hidden_TH.index_select(0, assignment_S // top_k), send_splits, recv_splits)

    grouping_R = None
    if sum(n > 0 for n in recv_splits) > 1:
        grouping_R = by_expert(received_WE).to(rows.device)
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
    (num_tokens, top_k), hidden_size = routing_weights_TK.shape, rows_SH.shape[1]
    complete = rows_SH.shape[0] == num_tokens * top_k
    shape = (num_tokens * top_k, hidden_size)
    by_assignment = rows_SH.new_empty(shape) if complete else rows_SH.new_zeros(shape)
    by_assignment.index_copy_(0, assignment_S, rows_SH)
    if top_k == 1:
        return by_assignment.mul_(routing_weights_TK.to(rows_SH.dtype))
    weighted = by_assignment.view(num_tokens, top_k, hidden_size).mul_(
        routing_weights_TK.to(rows_SH.dtype).unsqueeze(-1)
    )
    return weighted.sum(dim=1)


def by_expert(received_WE: IntArray) -> Tensor:
    """Order rows by expert that arrived by (source, expert).

    Args:
        received_WE: int64 ``[W, E]``, rows of every source and expert.

    Returns:
        int64 ``[R]`` on the host, the row at every position of the new order, which is by (expert, source).
    """
    starts_WE = _exclusive_cumsum(received_WE.reshape(-1)).reshape(received_WE.shape)
    return torch.from_numpy(ranges(starts_WE.T.reshape(-1), received_WE.T.reshape(-1)))


def send_order(expert_ids_TK: Tensor, sent_EW: IntArray) -> Tensor:
    """Order this rank's assignments by (destination, expert).

    Of an expert's assignments, in token order, the first ``sent_EW[e, 0]`` go to rank 0, the next to rank 1, and so on;
    what is left over is dropped.

    Args:
        expert_ids_TK: int64 ``[T, K]``; negative ids go nowhere.
        sent_EW: int64 ``[E, W]``, how many of this rank's assignments of an expert go to every rank.

    Returns:
        int64 ``[S]``, assignments.
    """
    ids = expert_ids_TK.reshape(-1)
    grouped = torch.argsort(ids, stable=True)
    # The masked ids, being negative, come first; what the plan drops of an expert stays between its blocks.
    counts_E = np.bincount(ids.cpu().numpy() + 1, minlength=sent_EW.shape[0] + 1)
    starts_E = np.cumsum(counts_E)[:-1]
    starts_EW = starts_E[:, None] + _exclusive_cumsum(sent_EW, axis=1)
    picks = ranges(starts_EW.T.reshape(-1), sent_EW.T.reshape(-1))
    return grouped.index_select(0, torch.from_numpy(picks).to(ids.device))


def _exclusive_cumsum(values: IntArray, axis: int = 0) -> IntArray:
    total: IntArray = np.cumsum(values, axis=axis)
    return total - values


def ranges(starts: IntArray, lengths: IntArray) -> IntArray:
    """Concatenate ``range(start, start + length)`` of every block, both int64 ``[num_blocks]``."""
    offsets = starts - _exclusive_cumsum(lengths)
    return np.repeat(offsets, lengths) + np.arange(lengths.sum())
