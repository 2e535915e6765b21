"""This rank's rows in the order in which it sends them, and the sum of their results by token.

Shape letters: T tokens of this rank, K top_k, S rows sent, H hidden size, E experts, C destinations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange import fused
from harmoeny.runtime.exchange.layout import rows_as_sent, send_blocks
from harmoeny.runtime.exchange.order import Assignments, Sent, ranges, send_order, tokens_of


class Gathering:
    """Gathers a rank's tokens in the order in which they are sent, see :func:`send_order`, some at a time."""

    def __init__(self, hidden_TH: Tensor, assignments: Assignments, sent_EC: IntArray) -> None:
        """Order what is sent.

        Args:
            hidden_TH: ``[T, H]``.
            assignments: what they want executed.
            sent_EC: int64 ``[E, C]``, how many of an expert's go to every destination.
        """
        self._hidden_TH, self._assignments = hidden_TH, assignments
        self._ends = [0, *np.cumsum(sent_EC.sum(axis=0)).tolist()]
        self.rows_SH = hidden_TH.new_empty(self._ends[-1], hidden_TH.shape[1])
        self._sent: Sent | None = None
        self._blocks: Tensor | None = None
        if not fused.is_available(hidden_TH.device):
            self._sent = Sent(send_order(assignments, sent_EC))
            return
        if assignments.numbers_TK is None:
            numbers_TK, _ = fused.number_assignments(assignments.expert_ids_TK, len(sent_EC))
            self._assignments = replace(assignments, numbers_TK=numbers_TK)
        self._starts = [self.rows_SH.data_ptr()] * sent_EC.shape[1]
        row_bytes = hidden_TH.shape[1] * hidden_TH.element_size()
        blocks = send_blocks(np.ascontiguousarray(sent_EC), rows_as_sent(sent_EC), np.array(self._starts), row_bytes)
        self._blocks = Device.of(hidden_TH.device).upload(blocks)

    @property
    def sent(self) -> Sent:
        """What the rows are, of those that were gathered."""
        assert self._sent is not None, "nothing was gathered"
        return self._sent

    def gather(self, columns: range) -> None:
        """Gather the rows of some destinations, whose turn it is: first those from 0 on."""
        if self._blocks is not None:
            self._sent = fused.put_tokens(
                self._hidden_TH, self._assignments, self._blocks, self._starts, len(self.rows_SH), columns,
                self._sent,
            )  # fmt: skip
            return
        rows = slice(self._ends[columns.start], self._ends[columns.stop])
        token_S = tokens_of(self.sent.assignment_S[rows], self._assignments.expert_ids_TK.shape[1])
        torch.index_select(self._hidden_TH, 0, token_S, out=self.rows_SH[rows])


def gather_rows(hidden_TH: Tensor, assignments: Assignments, sent_EC: IntArray) -> tuple[Tensor, Sent]:
    """Gather all at once; arguments as of :class:`Gathering`.

    Returns:
        ``[S, H]``, the rows, and what they are.
    """
    gathering = Gathering(hidden_TH, assignments, sent_EC)
    gathering.gather(range(sent_EC.shape[1]))
    return gathering.rows_SH, gathering.sent


def weighted_sum(rows_SH: Tensor, routing_weights_TK: Tensor, sent: Sent, later: Sequence[slice] = ()) -> Tensor:
    """Add up the results of every token, weighted by the router.

    Args:
        rows_SH: ``[S, H]``, results.
        routing_weights_TK: ``[T, K]``.
        sent: what the rows are; assignments that are not among them contribute nothing.
        later: rows that are left out, in order, without overlaps; :func:`add_rows` adds them.

    Returns:
        ``[T, H]``.
    """
    if sent.row_TK is not None:
        row_TK = sent.row_TK.masked_fill(_is_among(sent.row_TK, later), -1) if later else sent.row_TK
        return fused.add_up(rows_SH, routing_weights_TK, row_TK, len(rows_SH))
    assignment_S, (num_tokens, top_k) = sent.assignment_S, routing_weights_TK.shape
    rows_S = None
    if later:
        bounds = np.array([0, *(bound for part in later for bound in (part.start, part.stop)), len(rows_SH)])
        rows_S = ranges(bounds[::2], np.diff(bounds)[::2], rows_SH.device)
        assignment_S = assignment_S.index_select(0, rows_S)
    if len(assignment_S) == 0:
        return rows_SH.new_zeros(num_tokens, rows_SH.shape[1])
    # Gathers, weights and adds up in one pass over the rows, in FP32 whatever their type.
    weight_A = routing_weights_TK.to(rows_SH.dtype).reshape(-1)
    if len(assignment_S) == len(weight_A):
        row_A = torch.empty_like(assignment_S)
        row_A.scatter_(0, assignment_S, torch.arange(len(row_A), device=row_A.device))
        first_T = torch.arange(0, len(row_A), top_k, device=row_A.device)
        return embedding_bag(row_A, rows_SH, first_T, mode="sum", per_sample_weights=weight_A)
    executed_S, row_S = torch.sort(assignment_S)
    first_T = torch.searchsorted(executed_S, torch.arange(0, len(weight_A), top_k, device=executed_S.device))
    weight_S = weight_A.index_select(0, executed_S)
    row_S = row_S if rows_S is None else rows_S.index_select(0, row_S)
    return embedding_bag(row_S, rows_SH, first_T, mode="sum", per_sample_weights=weight_S)


def add_rows(
    rows_SH: Tensor, routing_weights_TK: Tensor, sent: Sent, onto_TH: Tensor, only: Sequence[slice] | None = None
) -> Tensor:
    """Add the results of a few of a rank's rows, weighted by the router, to what there is of their tokens already.

    Args:
        rows_SH: ``[S, H]``, results.
        routing_weights_TK: ``[T, K]``.
        sent: what the rows are.
        onto_TH: ``[T, H]``; changed where it has no gaps.
        only: the rows that are added, in order, without overlaps; None: all.

    Returns:
        ``[T, H]``.
    """
    if sent.row_TK is not None:
        row_TK = sent.row_TK if only is None else sent.row_TK.masked_fill(~_is_among(sent.row_TK, only), -1)
        return fused.add_up(rows_SH, routing_weights_TK, row_TK, len(rows_SH), onto_TH)
    assignment_S = sent.assignment_S
    if only is not None:
        rows_SH, assignment_S = (torch.cat([values[part] for part in only]) for values in (rows_SH, assignment_S))
    weights_S = routing_weights_TK.reshape(-1).index_select(0, assignment_S).to(rows_SH.dtype)
    return onto_TH.index_add_(0, tokens_of(assignment_S, routing_weights_TK.shape[1]), rows_SH * weights_S[:, None])


def _is_among(row_TK: Tensor, parts: Sequence[slice]) -> Tensor:
    """Return bool ``[T, K]``, whether the row of an assignment is in one of these parts."""
    is_among = torch.zeros_like(row_TK, dtype=torch.bool)
    for part in parts:
        is_among |= (row_TK >= part.start) & (row_TK < part.stop)
    return is_among
