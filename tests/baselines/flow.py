"""The least largest load that replicas allow, by maximum flows: what other ways to find it are held against."""

from __future__ import annotations

from itertools import product

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from harmoeny.placement import BoolArray, IntArray


def least_largest_load(load: IntArray, resident: BoolArray) -> int:
    """Search for the least capacity of the ranks under which a maximum flow carries all assignments.

    Args:
        load: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``, the ranks that an expert's assignments may flow to.
    """
    total, world_size = int(load.sum()), resident.shape[1]
    low: int = -(-total // world_size)
    high: int = total
    while low < high:
        middle = (low + high) // 2
        if _flow(load, resident, middle) == total:
            high = middle
        else:
            low = middle + 1
    return low


def least_largest_loads(load: IntArray, residents: BoolArray) -> IntArray:
    """Return the same for many residencies at once, by minimum cuts: some set of ranks has to do what only it can do.

    Args:
        load: int64 ``[num_experts]``.
        residents: bool ``[number, num_experts, world_size]``, for few ranks.

    Returns:
        int64 ``[number]``.
    """
    world_size = residents.shape[2]
    largest = np.zeros(len(residents), dtype=np.int64)
    for chosen in product([False, True], repeat=world_size):
        if any(chosen):
            confined = ~residents[:, :, ~np.array(chosen)].any(axis=2) @ load
            largest = np.maximum(largest, -(-confined // sum(chosen)))
    return largest


def _flow(load: IntArray, resident: BoolArray, capacity: int) -> int:
    num_experts, world_size = resident.shape
    experts, ranks = 1 + np.arange(num_experts), 1 + num_experts + np.arange(world_size)
    sink = 1 + num_experts + world_size
    expert, rank = np.nonzero(resident)
    rows = np.concatenate([np.zeros(num_experts, dtype=np.int64), experts[expert], ranks])
    columns = np.concatenate([experts, ranks[rank], np.full(world_size, sink)])
    capacities = np.concatenate([load, load[expert], np.full(world_size, capacity)]).astype(np.int32)
    graph = csr_array((capacities, (rows, columns)), shape=(sink + 1, sink + 1))
    return int(maximum_flow(graph, 0, sink).flow_value)
