"""Weights that move because placements change: what every rank has to copy, and from where."""

from __future__ import annotations

import numpy as np

from harmoeny.cost import Links
from harmoeny.held import with_free
from harmoeny.placement import BoolArray, IntArray
from harmoeny.predict import Costs, Sources
from harmoeny.sources import choose_sources


def move_sources(copied: BoolArray, resident: BoolArray, home: IntArray, costs: Costs, links: Links) -> Sources:
    """Decide where new residents come from: host memory, or the expert's home rank until now, whichever is less busy.

    Args:
        copied: bool ``[num_experts, world_size]``, what every rank has to copy.
        resident: bool ``[num_experts, world_size]``, what they hold until now.
        home: int64 ``[num_experts]``, the homes until now.
        costs: the machine's.
        links: between its ranks.
    """
    num_experts, world_size = copied.shape
    # Nothing has to be restored, as what gives way is no resident any more.
    free = np.full(world_size, num_experts, dtype=np.int64)
    moved = np.ascontiguousarray(copied.T.astype(np.int64))
    kept = resident & ~copied
    alone = costs._replace(relays=0.0)
    return choose_sources(moved, moved, home, kept, with_free(free, kept), alone, links, False)
