"""Predicts a layer's load from the layer before it: how often tokens go from one expert to another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import FloatArray, IntArray
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
    found = transitions(trace, num_experts)
    middles = [len(ids) // 2 for ids in trace.expert_ids]
    seen, rest = [slice(middle) for middle in middles], [slice(middle, None) for middle in middles]
    for layer, test in enumerate(_held_out(trace, num_experts, seen, rest)):
        earlier = trace.expert_ids[layer + 1][seen[layer + 1]]
        popular = np.bincount(earlier[earlier >= 0], minlength=num_experts).astype(np.float64)
        alike = np.tile(popular, (num_experts, 1))
        if test is None or test.right(test.then) < max(_LEAST_RIGHT, _TIMES_CHANCE * test.right(alike)):
            found[layer] = None
    return found


def accuracy(trace: RoutingTrace, num_experts: int) -> dict[str, float]:
    """Fit to every other token and predict the rest: shares of experts and of assignments, means over layers."""
    parts = ([slice(first, None, 2)] * len(trace.expert_ids) for first in (0, 1))
    tests = [test for test in _held_out(trace, num_experts, *parts) if test is not None]
    if not tests:
        return {}
    return {
        "predicted_experts": _mean([test.right(test.then) for test in tests]),
        "predicted_load": _mean([test.load_right() for test in tests]),
    }


@dataclass(frozen=True)
class _Test:
    """Transitions to the next layer, and tokens that they were not fitted to.

    Attributes:
        then: float64 ``[num_experts, num_experts]``, the transitions.
        ids: int64 ``[num_tokens, top_k]``, experts of the tokens; none is missing.
        actual: int64 ``[num_tokens, top_k]``, in the next layer.
    """

    then: FloatArray
    ids: IntArray
    actual: IntArray

    def right(self, then: FloatArray) -> float:
        """Return the share of the tokens' next experts that transitions predict, these or others."""
        scores = sum(then[self.ids[:, k]] for k in range(self.ids.shape[1]))
        guess = np.argsort(-np.asarray(scores), axis=1, kind="stable")[:, : self.actual.shape[1]]
        return float((guess[:, :, None] == self.actual[:, None, :]).any(axis=1).mean())

    def load_right(self) -> float:
        """Return the share of the assignments that are where the transitions expect them."""
        num_experts = len(self.then)
        expected = np.bincount(self.ids.ravel(), minlength=num_experts) @ self.then
        missed = np.abs(expected - np.bincount(self.actual.ravel(), minlength=num_experts)).sum() / 2
        return float(1 - missed / self.actual.size)


def _held_out(
    trace: RoutingTrace, num_experts: int, seen: Sequence[slice], rest: Sequence[slice]
) -> Iterator[_Test | None]:
    """Yield a test per layer but the last; None where nothing follows, or no token has all its experts.

    Args:
        trace: the calibration batches.
        num_experts: experts per layer.
        seen: by layer, the tokens to fit to.
        rest: by layer, the tokens to test on.
    """
    fitted = RoutingTrace([ids[part] for ids, part in zip(trace.expert_ids, seen, strict=True)], trace.stacks)
    for layer, then in enumerate(transitions(fitted, num_experts)):
        ids, actual = (trace.expert_ids[at][rest[at]][:_MOST_TOKENS] for at in (layer, layer + 1))
        if then is None:
            yield None
            continue
        whole = (ids >= 0).all(axis=1) & (actual >= 0).all(axis=1)
        yield _Test(then, ids[whole], actual[whole]) if whole.any() else None


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
