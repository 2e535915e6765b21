"""What a recorded routing is like: how popular experts are, how that drifts, and how layers depend on each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from experiments.routing.trace import RecordedRouting
from harmoeny.placement import IntArray, place

FloatArray = npt.NDArray[np.float64]


def popularity(trace: RecordedRouting) -> FloatArray:
    """Return float64 ``[num_layers, num_experts]``, load over that of an even share, by falling load.

    All batches and ranks together.
    """
    loads = trace.counts.sum(axis=(0, 2)).astype(np.float64)
    relative: FloatArray = -np.sort(-loads / loads.mean(axis=1, keepdims=True), axis=1)
    return relative


def imbalance(trace: RecordedRouting, world_size: int) -> FloatArray:
    """Return float64 ``[num_batches, num_layers]``, largest load of a rank over the mean with experts in blocks.

    That is what static expert parallelism has; 1 where nothing was routed.

    Raises:
        ValueError: fewer than one rank.
    """
    if world_size < 1:
        raise ValueError(f"--ranks: {world_size}, must be at least 1")
    home = place("contiguous", trace.num_experts, world_size).home
    loads = np.zeros((trace.num_batches, trace.num_layers, world_size))
    by_expert = trace.counts.sum(axis=2)
    for rank in range(world_size):
        loads[:, :, rank] = by_expert[:, :, home == rank].sum(axis=2)
    mean = loads.mean(axis=2)
    return np.where(mean > 0, loads.max(axis=2) / np.where(mean > 0, mean, 1.0), 1.0)


def drift(trace: RecordedRouting) -> tuple[FloatArray, FloatArray]:
    """Return how far the loads of two batches are apart, and how far they would be if nothing changed but chance.

    Returns:
        Two of float64 ``[num_batches - 1]``, for batches 1, 2, ... apart: the share of assignments that would have to
        go to other experts (half the sum of absolute differences of shares), mean over layers and pairs of batches.
        By chance: expected for independent assignments with the shares of both batches together.
    """
    counts = trace.counts.sum(axis=2).astype(np.float64)
    totals = np.maximum(counts.sum(axis=2), 1.0)
    shares = counts / totals[:, :, None]
    apart, chance = (np.zeros(max(trace.num_batches - 1, 0)) for _ in range(2))
    for lag in range(1, trace.num_batches):
        apart[lag - 1] = np.abs(shares[lag:] - shares[:-lag]).sum(axis=2).mean() / 2
        both = (counts[lag:] + counts[:-lag]) / (totals[lag:] + totals[:-lag])[:, :, None]
        variance = both * (1 - both) * (1 / totals[lag:] + 1 / totals[:-lag])[:, :, None]
        chance[lag - 1] = np.sqrt(2 / np.pi * variance).sum(axis=2).mean() / 2
    return apart, chance


def layer_dependence(trace: RecordedRouting) -> FloatArray:
    """Return float64 ``[num_layers, num_layers]``, how much one layer says of another, from 0 to 1.

    With paths of tokens: mutual information of a token's first experts over the smaller of their entropies, which is
    above 0 by chance where there are few tokens. Without: how the imbalance of the two goes together from batch to
    batch (correlation of largest over mean load of an expert; below 0 where it does the opposite).
    """
    layers = trace.num_layers
    if not trace.paths:
        peaks = popularity_peaks(trace)
        varied = peaks.std(axis=0) > 0
        found = np.eye(layers)
        if trace.num_batches > 2 and varied.any():
            found[np.ix_(varied, varied)] = np.corrcoef(peaks[:, varied], rowvar=False)
        return found
    first = [_first_experts(trace, layer) for layer in range(layers)]
    found = np.eye(layers)
    for row in range(layers):
        for column in range(row):
            if len(first[row]) == len(first[column]):
                found[row, column] = found[column, row] = _information(first[row], first[column], trace.num_experts)
    return found


def popularity_peaks(trace: RecordedRouting) -> FloatArray:
    """Return float64 ``[num_batches, num_layers]``, the most popular expert's load over the mean."""
    loads = trace.counts.sum(axis=2).astype(np.float64)
    peaks: FloatArray = loads.max(axis=2) / np.maximum(loads.mean(axis=2), 1e-12)
    return peaks


def _first_experts(trace: RecordedRouting, layer: int) -> IntArray:
    """Return int64 ``[num_tokens]``, the first expert of every token of all batches and ranks, -1 for none."""
    cells = [(batch, layer, rank) for batch, rank in np.ndindex(trace.num_batches, trace.world_size)]
    return np.concatenate([trace.paths[cell][:, 0] for cell in cells])


def _information(one: IntArray, other: IntArray, num_experts: int) -> float:
    both = (one >= 0) & (other >= 0)
    joint = np.zeros((num_experts, num_experts))
    np.add.at(joint, (one[both], other[both]), 1.0)
    joint /= max(joint.sum(), 1.0)
    entropies = [_entropy(joint.sum(axis=axis)) for axis in (0, 1)]
    shared = sum(entropies) - _entropy(joint.ravel())
    return float(np.clip(shared / min(entropies), 0.0, 1.0)) if min(entropies) > 0 else 0.0


def _entropy(shares: FloatArray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())
