"""What a rank executes before the plan is known: some of its own rows, of experts that it holds.

From the router until the first products a rank's device would wait: for the counts of all ranks, and for the plan that
is made of them. Whatever the plan will be, most of a hot expert's rows that are on a rank which holds it stay there. So
a rank begins with those, for about as long as the plan takes to come, and what is planned, exchanged and executed then
is the rest of the batch. Who executes what early follows from its own counts and from what it holds, so a rank can tell
before it has heard of the others, and everybody can tell of everybody afterwards.

What is begun cannot be moved: no more is taken than the wait is long. An expert that is executed in two parts is read
twice and launched once more, so only experts with many rows are begun, and in whole tiles, of which there are as many
then as there would be together.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs

#: What of a launch the products of an expert have to take at least, where every expert has its own.
_LEAST_LAUNCH = 0.5
#: Share of a rank's rows that it must have time for: plans of what is left differ by as much by chance.
_LEAST_SHARE = 1 / 32


class HeadStart(NamedTuple):
    """How much a rank executes early; all in rows, so that a device chooses the same as a host.

    Attributes:
        most_rows: of all experts together, with what each takes beside its rows.
        slice_rows: rows that would take as long as what an expert takes beside its own.
        least_rows: of an expert, at least 1: with fewer it is not begun.
        tile_rows: of which the rows of an expert are a multiple.
        batch_rows: a rank that has more rows begins nothing.
    """

    most_rows: int
    slice_rows: int
    least_rows: int
    tile_rows: int
    batch_rows: int

    @classmethod
    def of(cls, budget_s: float, costs: Costs) -> HeadStart | None:
        """Return what can be executed in some time; None: nothing that is worth it.

        While a host launches what is early it does not plan, so rows have to take at least as long as beginning them.
        """
        row_s, tile = costs.token_s + costs.copy_token_s, max(1, int(costs.tile_tokens))
        launch_s, slice_s = (costs.launch_s, 0.0) if costs.grouped else (0.0, costs.launch_s)
        once_s = costs.early_s + launch_s
        if budget_s < 2 * once_s:
            return None
        least_s = max(costs.weights_s, _LEAST_LAUNCH * slice_s)
        most_rows = int((budget_s - once_s) / row_s)
        head_start = cls(
            most_rows=most_rows,
            slice_rows=ceil(slice_s / row_s),
            least_rows=max(tile, ceil(least_s / costs.token_s)),
            tile_rows=tile,
            batch_rows=int(most_rows / _LEAST_SHARE),
        )
        return head_start if most_rows >= head_start.slice_rows + head_start.least_rows else None


@compiled
def early_rows(counts: IntArray, resident: BoolArray, head_start: HeadStart) -> IntArray:
    """Choose what ranks execute early: of what they hold, first the experts with most whole tiles of their own rows.

    Args:
        counts: int64 ``[n, num_experts]``, assignments of some ranks' tokens.
        resident: bool ``[num_experts, n]``, what these ranks hold.
        head_start: how much.

    Returns:
        int64 ``[n, num_experts]``.
    """
    num_ranks, num_experts = counts.shape
    most_rows, slice_rows, least_rows, tile_rows, batch_rows = head_start
    early = np.zeros((num_ranks, num_experts), dtype=np.int64)
    experts, rows = np.empty(num_experts, dtype=np.int64), np.empty(num_experts, dtype=np.int64)
    for rank in range(num_ranks):
        number = total = 0
        for expert in range(num_experts):
            total += counts[rank, expert]
            if counts[rank, expert] >= least_rows and resident[expert, rank]:
                experts[number] = expert
                rows[number] = counts[rank, expert] // tile_rows * tile_rows
                number += 1
        if total > batch_rows:
            continue
        begun = 0
        for i in np.argsort(-rows[:number], kind="mergesort"):
            left = (most_rows - begun - slice_rows) // tile_rows * tile_rows
            if min(rows[i], left) < least_rows:
                break
            early[rank, experts[i]] = min(rows[i], left)
            begun += rows[i] + slice_rows
    return early


def early_of_all(counts: IntArray, resident: BoolArray, head_start: HeadStart | None) -> IntArray | None:
    """Return what all ranks execute early, or None where nobody does anything.

    Args:
        counts: int64 ``[world_size, num_all_experts]``, with those of shared experts, which are never early.
        resident: bool ``[num_experts, world_size]``, what they hold of the others.
        head_start: how much; None: nothing.
    """
    if head_start is None or counts.max(initial=0) < head_start.least_rows:
        return None
    num_experts = len(resident)
    if num_experts == counts.shape[1]:
        early = early_rows(counts, resident, head_start)
    else:
        early = np.zeros_like(counts)
        early[:, :num_experts] = early_rows(np.ascontiguousarray(counts[:, :num_experts]), resident, head_start)
    return early if early.any() else None
