"""Predicts a layer's load from the layer before it: how often tokens go from one expert to another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import IntArray
from harmoeny.predict import FloatArray
from harmoeny.trace import RoutingTrace

#: Share of predictions that has to be right, and how many times as many as popularity alone gives.
_LEAST_RIGHT, _TIMES_CHANCE = 0.5, 1.2
#: Tokens whose predictions are compared with the gate's choice.
_MOST_TOKENS = 8192


@compiled
def count_pairs(first: IntArray, second: IntArray, num_experts: int) -> IntArray:
    """Count how often a token goes to one expert in a layer and to another in the next; every pair of a token counts.

    Args:
        first: int64 ``[num_tokens, top_k]``, experts in a layer; negative where a token has none.
        second: int64 ``[num_tokens, top_k]``, in the next layer; row t is the same token.
        num_experts: experts per layer.

    Returns:
        int64 ``[num_experts, num_experts]``.
    """
    pairs = np.zeros((num_experts, num_experts), dtype=np.int64)
    for token in range(first.shape[0]):
        for before in first[token]:
            if before >= 0:
                for after in second[token]:
                    if after >= 0:
                        pairs[before, after] += 1
    return pairs


def transitions(trace: RoutingTrace, num_experts: int) -> list[FloatArray | None]:
    """Return, per layer but the last, the shares of the next layer's experts by expert; rows sum to 1.

    An expert that no token had is followed as the average one is.

    Args:
        trace: the calibration batches.
        num_experts: experts per layer.
    """
    found: list[FloatArray | None] = []
    for layer, (stack, next_stack) in enumerate(pairwise(trace.stacks)):
        if stack != next_stack:
            found.append(None)
            continue
        pairs = count_pairs(trace.expert_ids[layer], trace.expert_ids[layer + 1], num_experts).astype(np.float64)
        average = pairs.sum(axis=0) + 1e-9
        pairs[pairs.sum(axis=1) == 0] = average
        found.append(pairs / pairs.sum(axis=1, keepdims=True))
    return found


def reliable(trace: RoutingTrace, num_experts: int) -> list[FloatArray | None]:
    """Return :func:`transitions` where they predict later batches; None where they do not.

    They are fitted to the first half of the tokens, and asked for the experts of the second: at least half of those
    must be right, and a fifth more than the most popular experts would give. Hot experts that move from batch to batch,
    and those that stay, which need no prediction, leave nothing.

    Args:
        trace: the calibration batches, one after another.
        num_experts: experts per layer.
    """
    middle = [len(ids) // 2 for ids in trace.expert_ids]
    seen = RoutingTrace([ids[:half] for ids, half in zip(trace.expert_ids, middle, strict=True)], trace.stacks)
    found = transitions(trace, num_experts)
    for layer, then in enumerate(transitions(seen, num_experts)):
        ids, actual = (trace.expert_ids[at][middle[at] :][:_MOST_TOKENS] for at in (layer, layer + 1))
        earlier = seen.expert_ids[layer + 1]
        popular = np.bincount(earlier[earlier >= 0], minlength=num_experts).astype(np.float64)
        alike = np.tile(popular, (num_experts, 1))
        right = None if then is None else _hits(ids, actual, then)
        if right is None or right < max(_LEAST_RIGHT, _TIMES_CHANCE * (_hits(ids, actual, alike) or 0.0)):
            found[layer] = None
    return found


def _hits(ids: IntArray, actual: IntArray, then: FloatArray) -> float | None:
    """Return the share of tokens' experts that is predicted; both are int64 ``[num_tokens, top_k]``, -1 for none."""
    whole = (ids >= 0).all(axis=1) & (actual >= 0).all(axis=1)
    if not whole.any():
        return None
    ids, actual = ids[whole], actual[whole]
    scores = sum(then[ids[:, k]] for k in range(ids.shape[1]))
    guess = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, : actual.shape[1]]
    return float((guess[:, :, None] == actual[:, None, :]).any(axis=1).mean())


def accuracy(trace: RoutingTrace, num_experts: int) -> dict[str, float]:
    """Fit to every other token and predict the rest: shares of experts and of assignments, means over layers."""
    seen = RoutingTrace([ids[::2] for ids in trace.expert_ids], trace.stacks)
    of_tokens, of_loads = [], []
    for layer, then in enumerate(transitions(seen, num_experts)):
        ids, actual = (trace.expert_ids[at][1::2][:_MOST_TOKENS] for at in (layer, layer + 1))
        if then is None or (right := _hits(ids, actual, then)) is None:
            continue
        whole = (ids >= 0).all(axis=1) & (actual >= 0).all(axis=1)
        ids, actual = ids[whole], actual[whole]
        of_tokens.append(right)
        expected = np.bincount(ids.ravel(), minlength=num_experts) @ then
        missed = np.abs(expected - np.bincount(actual.ravel(), minlength=num_experts)).sum() / 2
        of_loads.append(float(1 - missed / actual.size))
    return {"predicted_experts": _mean(of_tokens), "predicted_load": _mean(of_loads)} if of_tokens else {}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


@compiled
def expect(counts: IntArray, then: FloatArray) -> FloatArray:
    """Return float64 ``[world_size, num_experts]``, the next layer's counts if shares are those of ``then``.

    Not a library's product, whose last bits may differ from rank to rank.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        then: float64 ``[num_experts, num_experts]``.
    """
    world_size, num_experts = counts.shape
    expected = np.zeros((world_size, num_experts))
    for rank in range(world_size):
        row = expected[rank]
        for expert in range(num_experts):
            number, shares = counts[rank, expert], then[expert]
            if number > 0:
                for following in range(num_experts):
                    row[following] += number * shares[following]
    return expected


@compiled
def expect_alike(counts: IntArray, then: FloatArray) -> FloatArray:
    """Return :func:`expect` in less time, with the same shares of experts for all ranks.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        then: float64 ``[num_experts, num_experts]``.
    """
    world_size, num_experts = counts.shape
    of_rank = np.zeros(world_size, dtype=np.int64)
    together = np.zeros((1, num_experts), dtype=np.int64)
    for rank in range(world_size):
        for expert in range(num_experts):
            of_rank[rank] += counts[rank, expert]
            together[0, expert] += counts[rank, expert]
    total = expect(together, then)[0]
    assignments = max(of_rank.sum(), 1)
    expected = np.empty((world_size, num_experts))
    for rank in range(world_size):
        for expert in range(num_experts):
            expected[rank, expert] = total[expert] * of_rank[rank] / assignments
    return expected
