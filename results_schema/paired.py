"""Ratios of what was measured in the same rounds, with intervals: for measuring until one is narrow, and for reports.

docs/metrics.md says why they are as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import comb, sqrt
from statistics import median
from typing import NamedTuple

#: From so many mirrored rounds on every two are averaged; the interval of fewer averages would be too short.
ENOUGH_TO_AVERAGE = 8
_TAIL = 0.025


class Ratio(NamedTuple):
    """A ratio with its 95 % interval, over ``n`` rounds."""

    median: float
    low: float
    high: float
    n: int

    @property
    def reach(self) -> float:
        """Half the interval's length, relative to the ratio."""
        return (self.high - self.low) / (2 * self.median)


def mirrored_ratio(ratios: Sequence[float], calm: Sequence[bool]) -> Ratio:
    """Estimate a ratio from rounds of which every odd one went the opposite way of the one before.

    The geometric mean over two such rounds stays the same if the machine's speed changes linearly meanwhile. Rounds in
    which the machine moved stay among the samples, but do not make the interval shorter: as of any mean, its ends are
    further from the ratio by the square root of all samples over the calm ones.

    Args:
        ratios: by round, above 0, in order; at least one.
        calm: by round, whether the machine's yardstick stayed where it was.
    """
    samples, of_calm = list(ratios), list(calm)
    if len(ratios) >= ENOUGH_TO_AVERAGE:
        pairs = mirrored_pairs(len(ratios))
        samples = [sqrt(ratios[one] * ratios[other]) for one, other in pairs]
        of_calm = [calm[one] and calm[other] for one, other in pairs]
    middle, ends = median(samples), median_interval(samples)
    longer = sqrt(len(samples) / max(1, sum(of_calm)))
    low, high = (middle * (end / middle) ** longer for end in ends)
    return Ratio(middle, low, high, len(ratios))


def mirrored_pairs(num_rounds: int) -> list[tuple[int, int]]:
    """Return the rounds that mirror each other; the last of an odd number mirrors the one before, as that does."""
    pairs = [(first, first + 1) for first in range(0, num_rounds - 1, 2)]
    return [*pairs, (num_rounds - 2, num_rounds - 1)] if num_rounds % 2 and num_rounds > 1 else pairs


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Return the median's percentile bootstrap interval (Efron 1979), from its exact distribution."""
    atoms = sorted(_medians(sorted(samples)))
    return _quantile(atoms, _TAIL), _quantile(atoms, 1 - _TAIL)


def _medians(ordered: Sequence[float]) -> Iterator[tuple[float, float]]:
    """Yield what the median of as many draws with replacement can be, and how probable that is."""
    n, half = len(ordered), len(ordered) // 2
    if n % 2:
        reached = [_at_least(half + 1, n, i / n) for i in range(n + 1)]
        yield from ((value, reached[i + 1] - reached[i]) for i, value in enumerate(ordered))
        return
    # Of an even number the two in the middle count: the half-th smallest draw is i, the next one is j.
    below = [(i / n) ** half for i in range(n + 1)]
    reached = [_at_least(half, n, i / n) for i in range(n + 1)]
    for i, value in enumerate(ordered):
        both = reached[i + 1] - reached[i]
        for j in range(i + 1, n):
            apart = comb(n, half) * (below[i + 1] - below[i]) * (below[n - j] - below[n - j - 1])
            both -= apart
            yield (value + ordered[j]) / 2, apart
        yield value, both


def _at_least(successes: int, draws: int, chance: float) -> float:
    return sum(comb(draws, k) * chance**k * (1 - chance) ** (draws - k) for k in range(successes, draws + 1))


def _quantile(atoms: Sequence[tuple[float, float]], share: float) -> float:
    passed = 0.0
    for value, probability in atoms:
        passed += probability
        if passed >= share:
            return value
    return atoms[-1][0]
