"""Passes over a rank's rows or assignments that are one Triton kernel each; Triton comes with PyTorch for CUDA.

Shape letters: T tokens of this rank, K top_k, S rows sent, R rows, H hidden size, E experts, W ranks, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from harmoeny.head_start import HeadStart
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.order import Assignments, Sent

#: Bytes that a thread copies at a time.
_VECTOR_BYTES = 16
#: What a program holds at a time.
_TILE_COLUMNS, _TILE_BYTES, _TILE_ELEMENTS = 1024, 8192, 8192
#: As many are numbered at a time.
_FEW_ASSIGNMENTS, _MANY_ASSIGNMENTS = 1024, 4096
#: Of all experts, so many are compared with the others at a time.
_EXPERTS_AT_ONCE = 16
#: What a warp finds out about its token, every other warp would find out too.
_TOKEN_WARPS = 1


@cache
def is_available(device: torch.device) -> bool:
    """Return whether rows on the device can be moved by these; it is imported with the first that is."""
    return device.type == "cuda" and find_spec("triton") is not None


def number_assignments(
    expert_ids_TK: Tensor, num_groups: int, group_of_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Number this rank's assignments of every group in token order, and count them.

    Args:
        expert_ids_TK: int64 ``[T, K]``; a negative id leaves the assignment out.
        num_groups: number of groups.
        group_of_E: int32 ``[E + 1]``, anything and then every expert's group; None: experts are groups.

    Returns:
        int32 ``[T, K]``, numbers from 0, undefined for what is left out; and how many assignments are of each group,
        int64 ``[E]``, or with ``group_of_E`` of the groups up to each, int32 ``[num_groups]``.
    """
    from harmoeny.runtime.exchange.triton_rows import number_assignments

    numbers_TK = torch.empty_like(expert_ids_TK, dtype=torch.int32, memory_format=torch.contiguous_format)
    totals = expert_ids_TK.new_empty(num_groups, dtype=torch.int64 if group_of_E is None else torch.int32)
    num, few = expert_ids_TK.numel(), expert_ids_TK.numel() <= _FEW_ASSIGNMENTS
    number_assignments[(num_groups,)](
        expert_ids_TK.contiguous(), group_of_E, num, numbers_TK, totals, MAPPED=group_of_E is not None,
        TILE=_FEW_ASSIGNMENTS if few else _MANY_ASSIGNMENTS, num_warps=4 if few else 8,
    )  # fmt: skip
    return numbers_TK, totals


def choose_early(
    counts_E: Tensor, slot_of_E: Tensor, num_routed: int, num_slots: int, head_start: HeadStart
) -> tuple[Tensor, Tensor]:
    """Choose what :func:`harmoeny.head_start.early_rows` chooses for one rank.

    Args:
        counts_E: int64 ``[E]``, assignments of its tokens.
        slot_of_E: int32 ``[E + 1]``, anything and then every expert's slot, above all slots where it has none.
        num_routed: the experts, from the first, that may be early.
        num_slots: number of slots.
        head_start: how much.

    Returns:
        int64 ``[E]``, early assignments of every expert, and int32 ``[num_slots]``, of the slots up to each.
    """
    from harmoeny.runtime.exchange.triton_rows import choose_early

    early_E, ends = torch.empty_like(counts_E), slot_of_E.new_empty(num_slots)
    choose_early[(1,)](
        counts_E, slot_of_E, len(counts_E), num_routed, num_slots, *head_start, early_E, ends,
        EXPERTS=max(_EXPERTS_AT_ONCE, _power_of_2(len(counts_E))), AT_ONCE=_EXPERTS_AT_ONCE,
    )  # fmt: skip
    return early_E, ends


def split_early(expert_ids_TK: Tensor, numbers_TK: Tensor, early_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Divide a rank's assignments: of every expert the first are early.

    Args:
        expert_ids_TK: int64 ``[T, K]``; a negative id leaves the assignment out.
        numbers_TK: int32 ``[T, K]``, as :func:`number_assignments` returns them.
        early_E: int64 ``[E]``, early assignments of every expert.

    Returns:
        int64 ``[T, K]`` each, the experts of early assignments and of the others, -1 where they are not among them; and
        int32 ``[T, K]``, numbers of the others.
    """
    from harmoeny.runtime.exchange.triton_rows import split_early

    ids_TK, num = expert_ids_TK.contiguous(), expert_ids_TK.numel()
    early_ids_TK, rest_ids_TK, rest_numbers_TK = (torch.empty_like(like) for like in (ids_TK, ids_TK, numbers_TK))
    if num > 0:
        split_early[(-(-num // _FEW_ASSIGNMENTS),)](
            ids_TK, numbers_TK, early_E, num, early_ids_TK, rest_ids_TK, rest_numbers_TK, TILE=_FEW_ASSIGNMENTS
        )
    return early_ids_TK, rest_ids_TK, rest_numbers_TK


def spread_tokens(
    hidden_TH: Tensor, expert_ids_TK: Tensor, numbers_TK: Tensor, group_of_E: Tensor, ends: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Copy every token to its rows, which are ordered by group.

    Args:
        hidden_TH: ``[T, H]``.
        expert_ids_TK: int64 ``[T, K]``; a negative id leaves the assignment out.
        numbers_TK: int32 ``[T, K]``, as :func:`number_assignments` returns them.
        group_of_E: int32 ``[E + 1]``, as for it.
        ends: int32 ``[num_groups]``, one behind the last row of every group.
        num_rows: how many there may be, at most ``T * K``.

    Returns:
        ``[num_rows, H]``, with anything in the rows behind the last group; int64 ``[T, K]``, the row of every
        assignment, ``T * K`` where it is left out.
    """
    from harmoeny.runtime.exchange.triton_rows import spread_tokens

    (num_tokens, top_k), hidden_size = expert_ids_TK.shape, hidden_TH.shape[1]
    rows_RH = hidden_TH.new_empty(num_rows, hidden_size)
    row_TK = torch.empty_like(expert_ids_TK, memory_format=torch.contiguous_format)
    if num_tokens > 0:
        spread_tokens[(num_tokens,)](
            hidden_TH.contiguous(), expert_ids_TK.contiguous(), numbers_TK, group_of_E, ends, rows_RH, row_TK,
            TOP_K=top_k, NUM_COLUMNS=hidden_size, TILE_K=_power_of_2(top_k), TILE_COLUMNS=_tile_columns(hidden_TH),
            num_warps=_TOKEN_WARPS,
        )  # fmt: skip
    return rows_RH, row_TK


def put_tokens(
    hidden_TH: Tensor,
    assignments: Assignments,
    blocks: Tensor,
    bases: Sequence[int],
    num_sent: int,
    ranks: range | None = None,
    sent: Sent | None = None,
) -> Sent:
    """Write every token to wherever its experts are executed.

    Args:
        hidden_TH: ``[T, H]``.
        assignments: what they want executed.
        blocks: int64 ``[3, E, W]``, of every expert's assignments that go to a rank: their end; what to add to a number
            to get the row among those sent; the address at the rank that number 0 would have.
        bases: where the ranks' memory begins.
        num_sent: how many.
        ranks: the ranks that are written to now, in turn from 0 on; None: all.
        sent: what was returned for the ranks before these.
    """
    from harmoeny.runtime.exchange.triton_rows import put_tokens

    expert_ids_TK, numbers_TK = assignments.expert_ids_TK, assignments.numbers_TK
    (num_tokens, top_k), (_, num_experts, num_ranks) = expert_ids_TK.shape, blocks.shape
    if numbers_TK is None:
        numbers_TK, _ = number_assignments(expert_ids_TK, num_experts)
    if sent is None:
        row_TK = torch.empty_like(expert_ids_TK, memory_format=torch.contiguous_format)
        sent = Sent(expert_ids_TK.new_empty(num_sent), row_TK)
    ranks = range(num_ranks) if ranks is None else ranks
    if num_tokens > 0:
        put_tokens[(num_tokens,)](
            hidden_TH.contiguous(), expert_ids_TK.contiguous(), numbers_TK, blocks, num_experts * num_ranks,
            ranks.start, ranks.stop, sent.row_TK, sent.assignment_S,
            TOP_K=top_k, NUM_RANKS=num_ranks, NUM_COLUMNS=hidden_TH.shape[1],
            ALIGNMENT=_alignment(hidden_TH, bases), TILE_K=_power_of_2(top_k), TILE_RANKS=_power_of_2(num_ranks),
            TILE_COLUMNS=_tile_columns(hidden_TH),
            num_warps=_TOKEN_WARPS,
        )  # fmt: skip
    return sent


def put_rows(source: Tensor, blocks: Tensor, bases: Sequence[int], num_rows: int) -> None:
    """Copy rows, block by block.

    Args:
        source: ``[R, H]``.
        blocks: int64 ``[3, B]``, of consecutive rows: their end; what to add to a row's number to get its number in
            ``source``; the address that row 0 would have if it lay before them.
        bases: where the memory that they go to begins.
        num_rows: how many.
    """
    from harmoeny.runtime.exchange.triton_rows import put_rows

    if num_rows > 0:
        source, num_blocks, columns = source.contiguous(), blocks.shape[1], _tile_columns(source)
        rows = max(1, min(64, _TILE_BYTES // (columns * source.element_size())))
        put_rows[(-(-num_rows // rows),)](
            source, blocks, num_blocks, num_rows, num_blocks.bit_length(),
            NUM_COLUMNS=source.shape[1], ALIGNMENT=_alignment(source, [*bases, source.data_ptr()]), TILE_ROWS=rows,
            TILE_COLUMNS=columns,
        )  # fmt: skip


def put_copies(source: Tensor, addresses: tuple[int, ...]) -> None:
    """Copy a tensor ``[n]`` to several addresses."""
    put_rows(source[None], _copies(source.device, addresses, source.nbytes), addresses, len(addresses))


@lru_cache(maxsize=256)
def _copies(device: torch.device, addresses: tuple[int, ...], num_bytes: int) -> Tensor:
    """Return the blocks for :func:`put_rows` by which as many rows, all of them row 0, go to these addresses."""
    copy = np.arange(len(addresses))
    return Device.of(device).upload(np.stack([copy + 1, -copy, np.array(addresses) - copy * num_bytes]))


def add_up(
    rows_RH: Tensor, routing_weights_TK: Tensor, row_TK: Tensor, num_rows: int, onto: Tensor | None = None
) -> Tensor:
    """Add up the results of every token, weighted by the router, in FP32 whatever their type.

    Args:
        rows_RH: ``[R, H]``, results.
        routing_weights_TK: ``[T, K]``.
        row_TK: int64 ``[T, K]``, the row of every assignment; it contributes nothing where that is no row.
        num_rows: how many of the rows are results, from the first.
        onto: ``[T, H]``, what they are added to, in place where it has no gaps; tokens without results are not even
            read. None: nothing.

    Returns:
        ``[T, H]``.
    """
    from harmoeny.runtime.exchange.triton_rows import add_up

    num_tokens, top_k = row_TK.shape
    columns = min(_tile_columns(rows_RH), max(1, _TILE_ELEMENTS // _power_of_2(top_k)))
    out = rows_RH.new_empty(num_tokens, rows_RH.shape[1]) if onto is None else onto.contiguous()
    if num_tokens > 0:
        add_up[(num_tokens, -(-rows_RH.shape[1] // columns))](
            rows_RH.contiguous(), num_rows, row_TK, routing_weights_TK.contiguous(), out, ONTO=onto is not None,
            TOP_K=top_k, NUM_COLUMNS=rows_RH.shape[1], TILE_K=_power_of_2(top_k), TILE_COLUMNS=columns,
        )  # fmt: skip
    return out


def _alignment(rows: Tensor, addresses: Sequence[int]) -> int:
    """Return the bytes that may be copied at once between rows at these addresses."""
    return math.gcd(_VECTOR_BYTES, rows.shape[1] * rows.element_size(), *addresses)


def _tile_columns(rows: Tensor) -> int:
    return min(_TILE_COLUMNS, _power_of_2(rows.shape[1]))


def _power_of_2(number: int) -> int:
    """Return the smallest power of 2 that is at least ``number``."""
    return 1 << max(0, number - 1).bit_length()
