"""Bringing assignments to the ranks that the plan names, and their results back: one sort, one exchange each way.

Shape letters: T tokens of this rank, K top_k, A = T*K assignments, S rows sent, R rows received, H hidden size,
E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.plan import Plan
from harmoeny.runtime.exchange import fused
from harmoeny.runtime.exchange.comm import BringBack, Communicator
from harmoeny.runtime.exchange.gather import weighted_sum
from harmoeny.runtime.exchange.order import Assignments, Expected, Sent


@dataclass(frozen=True)
class Dispatched:
    """What combine must know of a dispatch.

    Attributes:
        sent: the rows that this rank sent.
        num_executed_E: int64 ``[E]`` on the host, rows per expert that arrived.
        bring_back: brings the results of the rows that arrived to where these came from.
    """

    sent: Sent
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
    held_WE: IntArray | None = None,
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
        held_WE: what :class:`~harmoeny.runtime.exchange.order.Expected` knows of the ranks' slots.

    Returns:
        ``[R, H]``, the rows to execute, grouped by expert, and what :func:`combine` needs.
    """
    assignments = Assignments(expert_ids_TK, counts[comm.rank], numbers_TK)
    # Where slices are executed in waves, those of fetched experts come last.
    expected = Expected(plan.fetch, held_WE) if fused.is_available(hidden_TH.device) else None
    rows = comm.send_rows(hidden_TH, assignments, plan.tokens, order, expected)
    num_executed_E = plan.tokens[:, :, comm.rank].sum(axis=0)
    return rows.rows_RH, Dispatched(rows.sent, num_executed_E, rows.bring_back)


def combine(results_RH: Tensor, routing_weights_TK: Tensor, dispatched: Dispatched) -> Tensor:
    """Bring results home and add them up, weighted by the router.

    Args:
        results_RH: ``[R, H]``, in the order in which :func:`dispatch` returned the rows.
        routing_weights_TK: ``[T, K]``.
        dispatched: what :func:`dispatch` returned.

    Returns:
        ``[T, H]``; assignments that nobody executed contribute nothing.
    """
    return weighted_sum(dispatched.bring_back(results_RH), routing_weights_TK, dispatched.sent)
