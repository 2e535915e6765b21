"""EPLB's replicas with the assignments shared by a linear programme in every batch: what replicas can do at best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from baselines.eplb import EPLB
from baselines.kit.replicas import FloatArray
from harmoeny.choices import Knowledge
from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray, Placement


@dataclass(kw_only=True)
class EPLBWithLP(EPLB):
    """EPLB's placement, and per batch the split over replicas with the least possible largest load.

    In the manner of DeepSeek's LPLB (README of deepseek-ai/LPLB): its linear programme, solved exactly by HiGHS on the
    host instead of approximately on the GPU, over EPLB's replicas instead of a fixed topology of them.
    """

    name: ClassVar[str] = "eplb_lp"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.HISTORY, Knowledge.EXACT})
    description: ClassVar[str] = "EPLB's replicas, shared by a linear programme in every batch"

    def executed(self, counts: IntArray, placement: Placement) -> IntArray:
        """Return int64 ``[num_experts, world_size]``: the shares of the replicas with the least largest load."""
        return balanced_shares(counts.sum(axis=0), placement.resident)


def balanced_shares(load: IntArray, resident: BoolArray) -> IntArray:
    """Split every expert's load over its replicas such that the largest load of a rank is the least possible.

    The linear programme minimises ``z`` subject to ``sum over ranks of x[e, r] = load[e]`` and ``sum over experts of
    x[e, r] <= z``, for replicated experts only: the others have no choice. By its cuts the optimum is a whole number
    over at most ``world_size``; with ``z`` rounded up the constraints are those of a flow, so the fractional solution,
    rounded down, can be completed in whole numbers.

    Args:
        load: int64 ``[num_experts]``.
        resident: bool ``[num_experts, world_size]``, every expert on at least one rank.

    Returns:
        int64 ``[num_experts, world_size]``, summing to ``load`` per expert.
    """
    world_size = resident.shape[1]
    shares = np.where(resident, load[:, None], 0)
    shared = np.flatnonzero((resident.sum(axis=1) > 1) & (load > 0))
    shares[shared] = 0
    if len(shared) == 0:
        return shares
    fractional, largest = _solve(load[shared], resident[shared], shares.sum(axis=0))
    # A whole part that the solver's error puts below or above comes out one lower, and is completed like the others.
    parts = np.floor(np.maximum(fractional - 1e-6, 0.0)).astype(np.int64)
    # The optimum is a multiple of 1 / n with n <= world_size: this margin is above any error and below any fraction.
    limit = int(np.ceil(largest - 0.5 / world_size))
    room = limit - shares.sum(axis=0) - parts.sum(axis=0)
    complete = _hand_out(parts, load[shared] - parts.sum(axis=1), room, resident[shared])
    assert complete, "the linear programme's optimum cannot be rounded"
    shares[shared] = parts
    return shares


def _solve(load: IntArray, resident: BoolArray, fixed: IntArray) -> tuple[FloatArray, float]:
    """Solve the linear programme.

    Args:
        load: int64 ``[num_shared]``, loads of the replicated experts.
        resident: bool ``[num_shared, world_size]``.
        fixed: int64 ``[world_size]``, loads of the other experts.

    Returns:
        float64 ``[num_shared, world_size]`` and the largest load.
    """
    num_shared, world_size = resident.shape
    expert, rank = np.nonzero(resident)
    n = len(expert)
    # Rows: the experts' sums, then the ranks' loads; columns: the parts, then z.
    rows = np.concatenate([expert, num_shared + rank, num_shared + np.arange(world_size)])
    columns = np.concatenate([np.arange(n), np.arange(n), np.full(world_size, n)])
    values = np.concatenate([np.ones(2 * n), np.full(world_size, -1.0)])
    matrix = csr_array((values, (rows, columns)), shape=(num_shared + world_size, n + 1))
    upper = np.concatenate([load, -fixed]).astype(np.float64)
    lower = np.concatenate([load.astype(np.float64), np.full(world_size, -np.inf)])
    cost = np.zeros(n + 1)
    cost[n] = 1.0
    result = milp(cost, bounds=Bounds(0, np.inf), constraints=LinearConstraint(matrix, lower, upper))
    assert result.success, result.message
    fractional = np.zeros((num_shared, world_size))
    fractional[expert, rank] = result.x[:n]
    return fractional, float(result.x[n])


@compiled
def _hand_out(parts: IntArray, missing: IntArray, room: IntArray, resident: BoolArray) -> bool:
    """Hand out the assignments that rounding down left over, one augmenting path each; tell whether all found room.

    Args:
        parts: int64 ``[num_shared, world_size]``; updated.
        missing: int64 ``[num_shared]``, assignments left over.
        room: int64 ``[world_size]``, what every rank may still take; updated.
        resident: bool ``[num_shared, world_size]``.
    """
    num_shared, world_size = resident.shape
    came_from = np.empty(world_size, dtype=np.int64)  # the rank before on the path, -1 at its start
    moved = np.empty(world_size, dtype=np.int64)  # the expert that moves along that step
    queue = np.empty(world_size, dtype=np.int64)
    for expert in range(num_shared):
        for _ in range(missing[expert]):
            came_from[:] = -2
            head = tail = 0
            for rank in range(world_size):
                if resident[expert, rank]:
                    came_from[rank], moved[rank] = -1, expert
                    queue[tail] = rank
                    tail += 1
            while head < tail and room[queue[head]] <= 0:
                rank = queue[head]
                head += 1
                for other in range(num_shared):
                    if parts[other, rank] == 0:
                        continue
                    for target in range(world_size):
                        if resident[other, target] and came_from[target] == -2:
                            came_from[target], moved[target] = rank, other
                            queue[tail] = target
                            tail += 1
            if head == tail:
                return False
            rank = queue[head]
            room[rank] -= 1
            while rank >= 0:
                parts[moved[rank], rank] += 1
                if came_from[rank] >= 0:
                    parts[moved[rank], came_from[rank]] -= 1
                rank = came_from[rank]
    return True
