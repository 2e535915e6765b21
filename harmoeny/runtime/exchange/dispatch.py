"""Bringing assignments to the ranks that the plan names, and their results back: one sort, one exchange each way.

Shape letters: T tokens of this rank, K top_k, A = T*K assignments, S rows sent, R rows received, H hidden size,
E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.exchange import fused
from harmoeny.runtime.exchange.comm import BringBack, Communicator
from harmoeny.runtime.exchange.order import Assignments, tokens_of


@dataclass(frozen=True)
class Dispatched:
    """What combine must know of a dispatch.

    Attributes:
        assignment_S: int64 ``[S]``, the assignment (token * K + k) behind every row sent, by destination and expert.
        row_TK: int64 ``[T, K]``, the row of every assignment, -1 for those not sent; None where it was not made.
        num_executed_E: int64 ``[E]`` on the host, rows per expert that arrived.
        bring_back: brings the results of the rows that arrived to where these came from.
    """

    assignment_S: Tensor
    row_TK: Tensor | None
    num_executed_E: IntArray
    bring_back: BringBack


def count_assignments(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor | None]:
    """Count this rank's assignments, and number them where that is one pass.

    Args:
        expert_ids_TK: int64 ``[T, K]``; a negative id marks an assignment that the model itself leaves out.
        num_experts: number of experts.

    Returns:
        int64 ``[E]``, counts, and what :class:`Assignments` knows as numbers.
    """
    if fused.is_available(expert_ids_TK.device):
        numbers_TK, counts_E = fused.number_assignments(expert_ids_TK, num_experts)
        return counts_E, numbers_TK
    ids = expert_ids_TK.reshape(-1) + 1
    # Unlike bincount, this never asks the device for the largest id.
    return ids.new_zeros(num_experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[1:], None


def dispatch(
    hidden_TH: Tensor,
    expert_ids_TK: Tensor,
    counts: IntArray,
    plan: Plan,
    comm: Communicator,
    order: Sequence[int] | None = None,
    numbers_TK: Tensor | None = None,
) -> tuple[Tensor, Dispatched]:
    """Send this rank's tokens where the plan wants them and group what arrives by expert.

    Args:
        hidden_TH: ``[T, H]``, this rank's tokens.
        expert_ids_TK: int64 ``[T, K]``, the router's choice; negative where the model itself leaves one out.
        counts: int64 ``[W, E]``, what all ranks want executed.
        plan: the same plan on all ranks.
        comm: the ranks.
        order: the experts with rows for this rank, in the order in which it wants their rows; None: ascending.
        numbers_TK: what :func:`count_assignments` returned.

    Returns:
        ``[R, H]``, the rows to execute, grouped by expert, and what :func:`combine` needs.
    """
    assignments = Assignments(expert_ids_TK, counts[comm.rank], numbers_TK)
    sent = comm.send_rows(hidden_TH, assignments, plan.tokens, order)
    num_executed_E = plan.tokens[:, :, comm.rank].sum(axis=0)
    return sent.rows_RH, Dispatched(sent.assignment_S, sent.row_TK, num_executed_E, sent.bring_back)


def combine(results_RH: Tensor, routing_weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
    """Bring results home and add them up, weighted by the router.

    Args:
        results_RH: ``[R, H]``, in the order in which :func:`dispatch` returned the rows.
        routing_weights_TK: ``[T, K]``.
        dispatched: what :func:`dispatch` returned.

    Returns:
        ``[T, H]``; assignments that nobody executed contribute nothing.
    """
    rows_SH = dispatched.bring_back(results_RH)
    if dispatched.row_TK is not None:
        return fused.add_up(rows_SH, routing_weights_TK, dispatched.row_TK, len(rows_SH))
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


def gather_rows(hidden_TH: Tensor, assignment_S: Tensor, top_k: int) -> Tensor:
    """Return ``[S, H]``, the token of every assignment (token * K + k), int64 ``[S]``; ``hidden_TH``: ``[T, H]``."""
    return hidden_TH.index_select(0, tokens_of(assignment_S, top_k))
