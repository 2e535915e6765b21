"""Which of a rank's assignments are early, decided on the device: the host has neither counts nor plan by then.

Shape letters: T tokens of this rank, K top_k, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from harmoeny.head_start import HeadStart


def choose_early(counts_E: Tensor, resident_E: Tensor, head_start: HeadStart) -> Tensor:
    """Choose for one rank what :func:`harmoeny.head_start.early_rows` chooses, without waiting for the device.

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
