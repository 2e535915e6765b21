"""The Triton kernel: a tile of one slot's rows times a tile of its matrix per program."""

from __future__ import annotations

import triton
import triton.language as tl


# No types: Triton takes annotations for its own.
@triton.jit(do_not_specialize=["num_slots", "alone_rows"])  # type: ignore[untyped-decorator]
def grouped_linear(  # type: ignore[no-untyped-def]
    rows, ends, matrices, bias, out, num_slots, num_out, alone_rows,
    stride_slot, stride_in, stride_out,
    NUM_IN: tl.constexpr, HAS_BIAS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    TILE_ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr,
):  # fmt: skip
    """Compute ``rows @ matrices[slot] + bias[slot]`` where a slot has less than ``alone_rows``.

    Grid: tiles of columns, tiles of rows.
    """
    # Which slot this program's tile of rows belongs to follows from the groups' ends, so that the host need not know.
    slots = tl.arange(0, SLOTS)
    group_ends = tl.load(ends + slots, mask=slots < num_slots, other=0)
    group_starts = tl.load(ends + slots - 1, mask=(slots > 0) & (slots < num_slots), other=0)
    num_own = group_ends - group_starts
    num_tiles = tl.where(num_own < alone_rows, (num_own + TILE_ROWS - 1) // TILE_ROWS, 0)
    tile_ends = tl.cumsum(num_tiles, 0)
    tile = tl.program_id(1)
    if tile < tl.max(tile_ends, 0):
        slot = tl.sum((tile_ends <= tile).to(tl.int32), 0)
        own = slots == slot
        first = tl.sum(tl.where(own, group_starts + (tile - tile_ends + num_tiles) * TILE_ROWS, 0), 0)
        end = tl.sum(tl.where(own, group_ends, 0), 0)
        row = (first + tl.arange(0, TILE_ROWS)).to(tl.int64)
        column = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
        inner = tl.arange(0, TILE_IN)
        row_there, column_there = (row < end)[:, None], (column < num_out)[None, :]
        left = rows + row[:, None] * NUM_IN + inner[None, :]
        right = matrices + slot.to(tl.int64) * stride_slot + inner[:, None] * stride_in + column[None, :] * stride_out
        total = tl.zeros((TILE_ROWS, TILE_OUT), dtype=tl.float32)
        for done in range(0, NUM_IN, TILE_IN):
            a = tl.load(left, mask=row_there & (inner[None, :] < NUM_IN - done), other=0.0)
            b = tl.load(right, mask=column_there & (inner[:, None] < NUM_IN - done), other=0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            left += TILE_IN
            right += TILE_IN * stride_in
        if HAS_BIAS:
            total += tl.load(bias + slot.to(tl.int64) * num_out + column, mask=column < num_out, other=0.0)[None, :]
        tl.store(
            out + row[:, None] * num_out + column[None, :],
            total.to(out.dtype.element_ty),
            mask=row_there & column_there,
        )
