"""Triton kernels that move rows, to wherever in mapped memory they belong, and that find out where that is.

Tables of blocks, int64 ``[3, num_blocks]``, say of consecutive rows where they end, what to add to a row's number to
find it at its source, and the address that row 0 would have if it lay before them. Rows count in 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


# No types: Triton takes annotations for its own. What changes from layer to layer is nothing to compile anew for.
@triton.jit(do_not_specialize=["num"])  # type: ignore[untyped-decorator]
def number_assignments(  # type: ignore[no-untyped-def]
    ids, group_of, num, numbers, totals, MAPPED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Number the assignments of every group in token order; grid: groups.

    A group is an expert, and ``totals`` gets how many assignments it has; or it is what ``group_of`` says of an expert,
    behind what it says of none, and ``totals`` gets how many there are up to this group.
    """
    group = tl.program_id(0)
    before, total = group * 0, group * 0
    for begin in range(0, num, TILE):
        assignment = begin + tl.arange(0, TILE)
        their = tl.load(ids + assignment, mask=assignment < num, other=-1)
        chosen = their >= 0
        if MAPPED:
            their = tl.load(group_of + 1 + their, mask=chosen, other=0)
        own = (chosen & (their == group)).to(tl.int32)
        tl.store(numbers + assignment, before + tl.cumsum(own, 0) - 1, mask=own > 0)
        before += tl.sum(own, 0)
        if MAPPED:
            total += tl.sum((chosen & (their <= group)).to(tl.int32), 0)
        else:
            total = before
    tl.store(totals + group, total.to(totals.dtype.element_ty))


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=[
        "num_experts", "num_routed", "num_slots", "most_rows", "slice_rows", "least_rows", "tile_rows", "batch_rows",
    ]
)  # fmt: skip
def choose_early(  # type: ignore[no-untyped-def]
    counts, slot_of, num_experts, num_routed, num_slots, most_rows, slice_rows, least_rows, tile_rows, batch_rows,
    early_of, ends, EXPERTS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Choose how many assignments of every expert are early, and where those of every slot end; one program."""
    expert, some = tl.arange(0, EXPERTS), tl.arange(0, AT_ONCE)
    routed = expert < num_routed
    count = tl.load(counts + expert, mask=routed, other=0)
    slot = tl.load(slot_of + 1 + expert, mask=routed, other=num_slots)
    whole = tl.where(slot < num_slots, count // tile_rows * tile_rows, 0)
    # What experts before it take, in the order of their rows; of two alike, the lower number is first.
    before = whole * 0
    for begin in range(0, num_routed, AT_ONCE):
        other = begin + some
        there = other < num_routed
        other_count = tl.load(counts + other, mask=there, other=0)
        other_slot = tl.load(slot_of + 1 + other, mask=there, other=num_slots)
        rows = tl.where(other_slot < num_slots, other_count // tile_rows * tile_rows, 0)
        alike = (rows[None, :] == whole[:, None]) & (other[None, :] < expert[:, None])
        is_first = (rows[None, :] > whole[:, None]) | alike
        before += tl.sum(tl.where(is_first, rows[None, :] + slice_rows, 0), 1)
    early = tl.minimum(whole, (most_rows - slice_rows - before) // tile_rows * tile_rows)
    begins = tl.sum(count, 0) <= batch_rows
    early = tl.where((early >= least_rows) & begins, early, 0)
    tl.store(early_of + expert, early, mask=expert < num_experts)
    for begin in range(0, num_slots, AT_ONCE):
        end = begin + some
        rows_to = tl.sum(tl.where(slot[None, :] <= end[:, None], early[None, :], 0), 1)
        tl.store(ends + end, rows_to.to(tl.int32), mask=end < num_slots)


@triton.jit(do_not_specialize=["num"])  # type: ignore[untyped-decorator]
def split_early(  # type: ignore[no-untyped-def]
    ids, numbers, early_of, num, early_ids, rest_ids, rest_numbers, TILE: tl.constexpr
):  # fmt: skip
    """Divide assignments: those with the first numbers of their experts are early; grid: tiles of assignments."""
    assignment = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = assignment < num
    expert = tl.load(ids + assignment, mask=there, other=-1)
    chosen = expert >= 0
    number = tl.load(numbers + assignment, mask=chosen, other=0)
    first = tl.load(early_of + expert, mask=chosen, other=0).to(tl.int32)
    is_early = chosen & (number < first)
    tl.store(early_ids + assignment, tl.where(is_early, expert, -1), mask=there)
    tl.store(rest_ids + assignment, tl.where(is_early, -1, expert), mask=there)
    tl.store(rest_numbers + assignment, number - first, mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def spread_tokens(  # type: ignore[no-untyped-def]
    hidden, ids, numbers, group_of, ends, out, row_of,
    TOP_K: tl.constexpr, NUM_COLUMNS: tl.constexpr, TILE_K: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Read a token once and write it to its rows, which are by group and number; grid: tokens.

    ``row_of`` gets the row of every assignment, or one more than there can be.
    """
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TILE_K)
    assignment = token * TOP_K + k
    expert = tl.load(ids + assignment, mask=k < TOP_K, other=-1)
    chosen = expert >= 0
    group = tl.load(group_of + 1 + expert, mask=chosen, other=0)
    first = tl.load(ends + group - 1, mask=chosen & (group > 0), other=0)
    row = first.to(tl.int64) + tl.load(numbers + assignment, mask=chosen, other=0)
    tl.store(row_of + assignment, tl.where(chosen, row, tl.num_programs(0) * TOP_K), mask=k < TOP_K)
    target = out + row * NUM_COLUMNS
    for begin in range(0, NUM_COLUMNS, TILE_COLUMNS):
        column = begin + tl.arange(0, TILE_COLUMNS)
        values = tl.load(hidden + token * NUM_COLUMNS + column, mask=column < NUM_COLUMNS)
        tl.store(
            target[:, None] + column[None, :], values[None, :], mask=chosen[:, None] & (column < NUM_COLUMNS)[None, :]
        )


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_blocks", "first_rank", "end_rank"], do_not_specialize_on_alignment=["blocks"]
)
def put_tokens(  # type: ignore[no-untyped-def]
    hidden, ids, numbers, blocks, num_blocks, first_rank, end_rank, row_of, assignment_of,
    TOP_K: tl.constexpr, NUM_RANKS: tl.constexpr, NUM_COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr,
    TILE_K: tl.constexpr, TILE_RANKS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Read a token once and write it wherever its experts are executed; grid: tokens.

    A block is what an expert's assignments, numbered for themselves, send to one rank; blocks are by expert and rank.
    ``row_of`` gets the row of every assignment among those sent, or -1, and ``assignment_of`` the reverse. Only what
    goes to ranks from ``first_rank`` on and before ``end_rank`` is sent; those from 0 on come first.
    """
    token = tl.program_id(0).to(tl.int64)
    k, rank = tl.arange(0, TILE_K), tl.arange(0, TILE_RANKS)
    assignment = token * TOP_K + k
    expert = tl.load(ids + assignment, mask=k < TOP_K, other=-1)
    chosen = expert >= 0
    number = tl.load(numbers + assignment, mask=chosen, other=0).to(tl.int64)
    first = expert * NUM_RANKS
    is_rank = (rank < NUM_RANKS)[None, :]
    ends = tl.load(blocks + first[:, None] + rank[None, :], mask=chosen[:, None] & is_rank, other=0)
    goes_to = tl.sum(((ends <= number[:, None]) & is_rank).to(tl.int32), 1)
    sent = chosen & (goes_to >= first_rank) & (goes_to < end_rank)
    block = blocks + first + goes_to
    row = tl.load(block + num_blocks, mask=sent, other=0) + number
    ROW_BYTES: tl.constexpr = NUM_COLUMNS * (hidden.dtype.element_ty.primitive_bitwidth // 8)
    address = tl.load(block + 2 * num_blocks, mask=sent, other=0) + number * ROW_BYTES
    tl.store(row_of + assignment, tl.where(sent, row, -1), mask=(k < TOP_K) & (goes_to >= first_rank))
    tl.store(assignment_of + row, assignment, mask=sent)
    target = tl.multiple_of(address, ALIGNMENT).to(tl.pointer_type(hidden.dtype.element_ty))
    target = tl.multiple_of(target, ALIGNMENT)
    for begin in range(0, NUM_COLUMNS, TILE_COLUMNS):
        column = begin + tl.arange(0, TILE_COLUMNS)
        values = tl.load(hidden + token * NUM_COLUMNS + column, mask=column < NUM_COLUMNS)
        tl.store(
            target[:, None] + column[None, :], values[None, :], mask=sent[:, None] & (column < NUM_COLUMNS)[None, :]
        )


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_blocks", "num_rows", "steps"], do_not_specialize_on_alignment=["source", "blocks"]
)
def put_rows(  # type: ignore[no-untyped-def]
    source, blocks, num_blocks, num_rows, steps,
    NUM_COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy rows, block by block, to where the table says; ``2 ** steps`` exceeds the blocks; grid: tiles of rows."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    there = row < num_rows
    low = tl.zeros((TILE_ROWS,), tl.int32)
    high = low + num_blocks
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        beyond = open_ & (tl.load(blocks + middle, mask=open_, other=0) <= row)
        high = tl.where(beyond, high, tl.minimum(middle, high))
        low = tl.where(beyond, middle + 1, low)
    ROW_BYTES: tl.constexpr = NUM_COLUMNS * (source.dtype.element_ty.primitive_bitwidth // 8)
    begin_at = row + tl.load(blocks + num_blocks + low, mask=there, other=0)
    address = tl.load(blocks + 2 * num_blocks + low, mask=there, other=0) + row * ROW_BYTES
    target = address.to(tl.pointer_type(source.dtype.element_ty))
    target = tl.multiple_of(target, ALIGNMENT)
    origin = tl.multiple_of(source + begin_at * NUM_COLUMNS, ALIGNMENT)
    for begin in range(0, NUM_COLUMNS, TILE_COLUMNS):
        column = begin + tl.arange(0, TILE_COLUMNS)
        inside = there[:, None] & (column < NUM_COLUMNS)[None, :]
        values = tl.load(origin[:, None] + column[None, :], mask=inside)
        tl.store(target[:, None] + column[None, :], values, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def add_up(  # type: ignore[no-untyped-def]
    rows, num_rows, row_of, weights, out,
    ONTO: tl.constexpr, TOP_K: tl.constexpr, NUM_COLUMNS: tl.constexpr, TILE_K: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the rows of every token, weighted; a row that is none adds nothing; grid: tokens, tiles of columns.

    The sum of a token is what ``out`` gets, or with ``ONTO`` what is added to it, where the token has any row.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    k = tl.arange(0, TILE_K)
    row = tl.load(row_of + token * TOP_K + k, mask=k < TOP_K, other=-1)
    there = (row >= 0) & (row < num_rows)
    weight = tl.load(weights + token * TOP_K + k, mask=there, other=0.0).to(rows.dtype.element_ty).to(tl.float32)
    values = tl.load(
        rows + row[:, None] * NUM_COLUMNS + column[None, :],
        mask=there[:, None] & (column < NUM_COLUMNS)[None, :],
        other=0.0,
    )
    total = tl.sum(weight[:, None] * values.to(tl.float32), 0)
    target, changes = out + token * NUM_COLUMNS + column, column < NUM_COLUMNS
    if ONTO:
        changes = changes & (column < NUM_COLUMNS * tl.sum(there.to(tl.int32), 0))
        total += tl.load(target, mask=changes, other=0.0).to(tl.float32)
    tl.store(target, total.to(out.dtype.element_ty), mask=changes)
