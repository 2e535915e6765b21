"""The Triton kernels of gates."""

from __future__ import annotations

import triton
import triton.language as tl


# No types: Triton takes annotations for its own.
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def swiglu_rows(  # type: ignore[no-untyped-def]
    gate_up, out, num_rows, WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):  # fmt: skip
    """Compute ``silu(gate) * up`` of rows that hold a gate and then an up part; grid: tiles of rows, of columns."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    there = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    origin = gate_up + row[:, None] * (2 * WIDTH) + column[None, :]
    gate = tl.load(origin, mask=there, other=0.0).to(tl.float32)
    up = tl.load(origin + WIDTH, mask=there, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row[:, None] * WIDTH + column[None, :], result.to(out.dtype.element_ty), mask=there)
