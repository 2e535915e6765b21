"""Which assignments make up a rank's share where systems cut an expert's assignments into ranges."""

from __future__ import annotations

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import IntArray


@compiled
def tokens_of_ranges(counts: IntArray, shares: IntArray, first: IntArray) -> IntArray:
    """Cut every expert's assignments, in the order of their source ranks, into one range per rank that executes some.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        shares: int64 ``[num_experts, world_size(dst)]``, the ranges' lengths; their sums per expert are those of
            ``counts``.
        first: int64 ``[num_experts]``, the rank whose range comes first; those of the others follow by number.

    Returns:
        int64 ``[world_size(src), num_experts, world_size(dst)]``.
    """
    world_size, num_experts = counts.shape
    tokens = np.zeros((world_size, num_experts, world_size), dtype=np.int64)
    for expert in range(num_experts):
        src = 0
        left = counts[0, expert]
        for i in range(-1, world_size):
            dst = first[expert] if i < 0 else i
            if i == first[expert]:
                continue
            wanted = shares[expert, dst]
            while wanted > 0:
                while left == 0:
                    src += 1
                    left = counts[src, expert]
                n = min(wanted, left)
                tokens[src, expert, dst] = n
                wanted -= n
                left -= n
    return tokens
