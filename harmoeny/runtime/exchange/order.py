"""Orders of rows, made on the device from the counts that the plan gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from harmoeny.placement import BoolArray, IntArray
from harmoeny.runtime.device import Device


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
    ascending = is_ascending(order)
    if ascending and min(np.count_nonzero(received_WE.any(axis=axis)) for axis in (1, 0)) <= 1:
        return None  # all from one source, or of one expert
    starts_WE = exclusive_cumsum(received_WE.reshape(-1)).reshape(received_WE.shape)
    if not ascending:
        starts_WE, received_WE = starts_WE[:, order], received_WE[:, order]
    return ranges(starts_WE.T, received_WE.T, device)


def is_ascending(order: Sequence[int] | None) -> bool:
    """Tell whether an order of experts, None for none, is the usual one."""
    return order is None or all(a < b for a, b in pairwise(order))


@dataclass(frozen=True)
class Assignments:
    """What one rank's tokens want executed.

    Attributes:
        expert_ids_TK: int64 ``[T, K]``; a negative id leaves the assignment out.
        counts_E: int64 ``[E]`` on the host, assignments of every expert.
        numbers_TK: int32 ``[T, K]``, which of its expert's assignments each is, in token order, from 0; undefined for
            those left out. None: they were not numbered.
    """

    expert_ids_TK: Tensor
    counts_E: IntArray
    numbers_TK: Tensor | None = None


class Expected(NamedTuple):
    """In which order ranks are expected to want the rows of their experts, the same on all ranks.

    Attributes:
        fetched_EW: bool ``[E, W]``, the experts that they want last, from the one with the most rows on.
        held_WE: int64 ``[W, E]``, the order of the others, among all experts; None: ascending.
    """

    fetched_EW: BoolArray
    held_WE: IntArray | None = None


@dataclass(frozen=True)
class Sent:
    """What a rank's rows are, in the order in which it sends them: by destination and, in some order, expert.

    Attributes:
        assignment_S: int64 ``[S]``, the assignment (token * K + k) behind every row.
        row_TK: int64 ``[T, K]``, the reverse, -1 for what is not sent; None where it was not made.
    """

    assignment_S: Tensor
    row_TK: Tensor | None = None


def send_order(assignments: Assignments, sent_EC: IntArray) -> Tensor:
    """Order this rank's assignments by (destination, expert).

    Destinations are ranks, or each rank's stages. Of an expert's assignments, in token order, the first
    ``sent_EC[e, 0]`` go to the first of them, and so on; what is left over is dropped.

    Args:
        assignments: this rank's.
        sent_EC: int64 ``[E, C]``, how many of an expert's go to every destination.

    Returns:
        int64 ``[S]``, assignments.
    """
    ids, counts_E = assignments.expert_ids_TK.reshape(-1), assignments.counts_E
    grouped = torch.argsort(ids, stable=True)
    # The masked ids, being negative, come first; what the plan drops of an expert stays between its blocks.
    starts_E = exclusive_cumsum(counts_E) + (len(ids) - counts_E.sum())
    starts_CE, sent_CE = starts_E + exclusive_cumsum(sent_EC, axis=1).T, sent_EC.T
    return grouped.index_select(0, ranges(starts_CE, sent_CE, ids.device))


def tokens_of(assignment_S: Tensor, top_k: int) -> Tensor:
    """Return int64 ``[S]``, the token of every assignment (token * K + k)."""
    return assignment_S if top_k == 1 else assignment_S // top_k


def exclusive_cumsum(values: IntArray, axis: int = 0) -> IntArray:
    """Return the sum of all values before each, along an axis."""
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
    offsets, repeats = Device.of(device).upload(np.stack([starts - exclusive_cumsum(lengths), lengths]))
    return torch.repeat_interleave(offsets, repeats, output_size=total) + torch.arange(total, device=device)
