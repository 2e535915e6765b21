"""Medians and paired ratios with bootstrap 95 % intervals, and percentiles with exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: From so many rounds on an interval covers the true median in 90 % of all experiments (docs/metrics.md).
ENOUGH_ROUNDS = 5
_RESAMPLES = 2000
#: What an interval of 95 % leaves out at either end.
_TAIL = 0.025


@dataclass(frozen=True)
class Estimate:
    """A median with its interval.

    Attributes:
        median: of the samples.
        low: lower end of the 95 % interval.
        high: upper end.
        n: number of samples.
    """

    median: float
    low: float
    high: float
    n: int


def median_interval(samples: npt.ArrayLike) -> Estimate:
    """Return the median and its percentile bootstrap interval (Efron 1979), seeded so that a report repeats.

    Args:
        samples: float ``[n]``, at least one.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"samples: {values.tolist()}, must be at least one finite number")
    middle = float(np.median(values))
    if values.size == 1 or np.ptp(values) == 0:
        return Estimate(middle, middle, middle, int(values.size))
    # The numbers of scipy.stats.bootstrap, whose import and checks take longer than most reports.
    draws = np.random.default_rng(0).integers(0, values.size, (_RESAMPLES, values.size))
    ordered = np.sort(values[draws], axis=1)  # the numbers of numpy.median, in a sixth of its time
    medians = (ordered[:, (values.size - 1) // 2] + ordered[:, values.size // 2]) / 2
    low, high = np.quantile(medians, [0.025, 0.975])
    return Estimate(middle, float(low), float(high), int(values.size))


def spread(samples: npt.ArrayLike) -> dict[str, float]:
    """Return ``mean``, ``p90`` and ``max`` of samples, for what comes in bursts that a median hides.

    Args:
        samples: float ``[n]``, at least one.
    """
    values = np.asarray(samples, dtype=np.float64)
    return {"mean": float(values.mean()), "p90": float(np.quantile(values, 0.9)), "max": float(values.max())}


def paired_ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Estimate:
    """Return the median of ratios of samples taken in the same rounds.

    Args:
        numerator: float ``[num_rounds]``.
        denominator: float ``[num_rounds]``, the same rounds in the same order.

    Raises:
        ValueError: different numbers of rounds, or a ratio that is not finite.
    """
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"numerator: {a.size} rounds, must be {b.size} as the denominator has")
    with np.errstate(divide="ignore", invalid="ignore"):  # refused by name just below
        ratios = a / b
    return median_interval(ratios)


def ratio_of_sums(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> tuple[float, float, float]:
    """Return the ratio of two sums over the same rounds, and the ends of its bootstrap 95 % interval over rounds.

    Args:
        numerator: float ``[num_rounds]``.
        denominator: float ``[num_rounds]``.
    """
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    draws = np.random.default_rng(0).integers(0, len(a), (_RESAMPLES, len(a)))
    low, high = np.quantile(a[draws].sum(axis=1) / b[draws].sum(axis=1), [_TAIL, 1 - _TAIL])
    return float(a.sum() / b.sum()), float(low), float(high)


def least_samples(percent: float) -> int:
    """Return how many samples a percentile needs: fewer have no 95 % interval, however it is computed.

    All of n samples are below the percentile with a probability of (percent / 100) ** n, which has to be 2.5 % at most,
    and so at the other end. Source: order statistics, Wilks 1941 (doi 10.1214/aoms/1177731788).
    """
    share = min(percent, 100 - percent) / 100
    return math.ceil(math.log(_TAIL) / math.log1p(-share))


def percentile(samples: npt.ArrayLike, percent: float) -> Estimate | None:
    """Return a percentile with its interval between two order statistics, or None where there are too few samples.

    The interval assumes that samples do not depend on each other.

    Args:
        samples: float ``[n]``.
        percent: above 0 and below 100.
    """
    from scipy.stats import binom  # 0.3 s

    values = np.sort(np.asarray(samples, dtype=np.float64))
    if values.size < least_samples(percent):
        return None
    # As many samples as this are below the percentile, with a probability of 2.5 % to either side of the ends.
    low, high = (int(binom.ppf(tail, values.size, percent / 100)) for tail in (_TAIL, 1 - _TAIL))
    middle = float(np.quantile(values, percent / 100))
    return Estimate(middle, float(values[low - 1]), float(values[high]), int(values.size))
