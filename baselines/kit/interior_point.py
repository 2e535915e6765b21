"""Splits loads over replicas by a few steps of an interior-point method: the programme of LPLB."""

from __future__ import annotations

import numpy as np

from baselines.kit.replicas import FloatArray
from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray

#: How far a step goes towards the nearest bound.
_STEP = 0.995
#: No number is nearer to its bound than that.
_TINY = 1e-12
#: Nearer to the optimum no step is worth it; loads are of the order of 1.
_NEAR = 1e-6


@compiled
def split_fractions(load: FloatArray, resident: BoolArray, fixed: FloatArray, num_steps: int) -> FloatArray:
    """Minimise ``m`` where every replicated expert's parts sum to its load, and every rank executes at most ``m``.

    Mehrotra's predictor and corrector (SIAM J. Optim. 2(4), 1992) from an interior point that satisfies all equations:
    even parts, ``m`` above the largest load, and the same price for every rank. What is left of each step is a system
    of one equation per rank, solved here and by no library, so that all ranks get the same bits.

    Args:
        load: float64 ``[num_shared]``, of the order of 1 per rank together.
        resident: bool ``[num_shared, world_size]``, at least one rank per expert.
        fixed: float64 ``[world_size]``, loads of the other experts.
        num_steps: of the method, at most.

    Returns:
        float64 ``[num_shared, world_size]``, the parts, positive where there is a replica.
    """
    num_shared, world_size = resident.shape
    x = np.zeros((num_shared, world_size))
    for e in range(num_shared):
        x[e] = np.where(resident[e], max(load[e] / resident[e].sum(), _TINY), 0.0)
    rank_load = fixed + x.sum(axis=0)
    slack = rank_load.max() + 0.1 - rank_load
    price = np.full(world_size, 1.0 / world_size)
    z = np.where(resident, price, 0.0)
    num_products = resident.sum() + world_size
    for _ in range(num_steps):
        gap = (x * z).sum() + (slack * price).sum()  # between the largest load and the least possible
        if gap < _NEAR:
            break
        mean = gap / num_products
        dx, dz, dslack, dprice = _direction(x, z, slack, price, resident, -x * z, -slack * price)
        primal, dual = _length(x, dx, slack, dslack), _length(z, dz, price, dprice)
        ahead = ((x + primal * dx) * (z + dual * dz)).sum()
        ahead += ((slack + primal * dslack) * (price + dual * dprice)).sum()
        ratio = ahead / num_products / mean
        target = mean * ratio * ratio * ratio
        of_x = np.where(resident, target - x * z - dx * dz, 0.0)
        of_slack = target - slack * price - dslack * dprice
        dx, dz, dslack, dprice = _direction(x, z, slack, price, resident, of_x, of_slack)
        primal, dual = _length(x, dx, slack, dslack), _length(z, dz, price, dprice)
        x = np.where(resident, np.maximum(x + primal * dx, _TINY), 0.0)
        slack = np.maximum(slack + primal * dslack, _TINY)
        z = np.where(resident, np.maximum(z + dual * dz, _TINY), 0.0)
        price = np.maximum(price + dual * dprice, _TINY)
    return x


@compiled
def _direction(
    x: FloatArray,
    z: FloatArray,
    slack: FloatArray,
    price: FloatArray,
    resident: BoolArray,
    of_x: FloatArray,
    of_slack: FloatArray,
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Solve for the step that changes the products of each number and its price by ``of_x`` and ``of_slack``.

    What the replicas of an expert exchange is written pair by pair: sums of differences would lose digits.
    """
    num_shared, world_size = x.shape
    weight, own = np.zeros_like(x), np.zeros_like(x)  # x and of_x, over z
    matrix = np.diag(slack / price)
    right = np.ones((2, world_size))
    right[0] = of_slack / price
    for e in range(num_shared):
        for r in range(world_size):
            if resident[e, r]:
                weight[e, r], own[e, r] = x[e, r] / z[e, r], of_x[e, r] / z[e, r]
        total = weight[e].sum()
        for r in range(world_size):
            if not resident[e, r]:
                continue
            for other in range(world_size):
                if resident[e, other] and other != r:
                    pair = weight[e, r] * weight[e, other] / total
                    matrix[r, r] += pair
                    matrix[r, other] -= pair
                    right[0, r] += (own[e, r] * weight[e, other] - weight[e, r] * own[e, other]) / total
    _solve(matrix, right)
    dprice = right[0] - right[1] * (right[0].sum() / right[1].sum())  # the prices' sum stays 1
    dx, dz = np.zeros_like(x), np.zeros_like(x)
    for e in range(num_shared):
        total = weight[e].sum()
        for r in range(world_size):
            if not resident[e, r]:
                continue
            dz[e, r] = own[e].sum() / total
            for other in range(world_size):
                if resident[e, other] and other != r:
                    apart = dprice[r] - dprice[other]
                    dz[e, r] += weight[e, other] * apart / total
                    dx[e, r] += (own[e, r] * weight[e, other] - weight[e, r] * own[e, other]) / total
                    dx[e, r] -= weight[e, r] * weight[e, other] * apart / total
    dslack = (of_slack - slack * dprice) / price
    return dx, dz, dslack, dprice


@compiled
def _solve(matrix: FloatArray, right: FloatArray) -> None:
    """Solve with a symmetric positive definite matrix by Cholesky's factors.

    Args:
        matrix: float64 ``[n, n]``; overwritten.
        right: float64 ``[m, n]``, right-hand sides; overwritten by the solutions.
    """
    n = len(matrix)
    for j in range(n):
        for k in range(j):
            matrix[j, j] -= matrix[j, k] * matrix[j, k]
        matrix[j, j] = np.sqrt(max(matrix[j, j], _TINY))
        for i in range(j + 1, n):
            for k in range(j):
                matrix[i, j] -= matrix[i, k] * matrix[j, k]
            matrix[i, j] /= matrix[j, j]
    for side in right:
        for i in range(n):
            for k in range(i):
                side[i] -= matrix[i, k] * side[k]
            side[i] /= matrix[i, i]
        for i in range(n - 1, -1, -1):
            for k in range(i + 1, n):
                side[i] -= matrix[k, i] * side[k]
            side[i] /= matrix[i, i]


@compiled
def _length(a: FloatArray, da: FloatArray, b: FloatArray, db: FloatArray) -> float:
    """Return how far ``a + t * da`` and ``b + t * db`` may go before a number is 0, at most 1."""
    length = 1.0
    for i in range(a.size):
        if da.flat[i] < 0:
            length = min(length, -_STEP * a.flat[i] / da.flat[i])
    for i in range(b.size):
        if db[i] < 0:
            length = min(length, -_STEP * b[i] / db[i])
    return length


@compiled
def rounded_shares(load: IntArray, parts: FloatArray) -> IntArray:
    """Round parts to whole numbers whose sums are the loads: the largest rests are rounded up.

    Args:
        load: int64 ``[num_shared]``.
        parts: float64 ``[num_shared, world_size]``, of any scale per expert; where they are 0, the shares are.

    Returns:
        int64 ``[num_shared, world_size]``.
    """
    shares = np.zeros(parts.shape, dtype=np.int64)
    for e in range(len(load)):
        exact = parts[e] * (load[e] / parts[e].sum())
        shares[e] = np.floor(exact).astype(np.int64)
        rests = np.argsort(-(exact - shares[e]) - (parts[e] > 0), kind="mergesort")
        for rank in rests[: load[e] - shares[e].sum()]:
            shares[e, rank] += 1
    return shares
