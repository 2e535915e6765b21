"""Medians and paired ratios with bootstrap 95 % intervals, and percentiles with exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

#: From so many rounds on an interval covers the true median in 90 % of all experiments (docs/metrics.md).
ENOUGH_ROUNDS = 5
_RESAMPLES = 2000
#: Resampled values that are held at a time.
_SAMPLES_AT_ONCE = 2**20
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
    return median_intervals(np.asarray(samples, dtype=np.float64).reshape(1, -1))[0]


def median_intervals(samples: npt.NDArray[np.float64]) -> list[Estimate]:
    """Return what `median_interval` does for each of several quantities, in a fraction of the time.

    Args:
        samples: ``[num_quantities, n]``, n at least 1.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    n = samples.shape[1]
    if n == 0 or not np.isfinite(samples).all():
        (values, *_) = (values for values in samples if n == 0 or not np.isfinite(values).all())
        raise ValueError(f"samples: {values.tolist()}, must be at least one finite number")
    return list(_intervals(samples.tobytes(), n))


@lru_cache(maxsize=512)  # a run's summary, table, figures and page ask for the same ones
def _intervals(content: bytes, n: int) -> tuple[Estimate, ...]:
    """Return what `median_intervals` does, of the samples' bytes."""
    samples = np.frombuffer(content).reshape(-1, n)
    middle = np.median(samples, axis=1)
    ends = np.stack([middle, middle])
    (varied,) = np.nonzero(np.ptp(samples, axis=1) > 0)
    at_once = max(1, _SAMPLES_AT_ONCE // (_RESAMPLES * n))
    for some in (varied[begin : begin + at_once] for begin in range(0, len(varied), at_once)):
        # The numbers of scipy.stats.bootstrap, whose import and checks take longer than most reports.
        ordered = np.sort(samples[some][:, _draws(n)], axis=2)  # those of numpy.median, in a sixth of its time
        medians = (ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2
        ends[:, some] = np.quantile(medians, [_TAIL, 1 - _TAIL], axis=1)
    found = zip(middle, *ends, strict=True)
    return tuple(Estimate(float(median), float(low), float(high), n) for median, low, high in found)


@lru_cache(maxsize=2)
def _draws(n: int) -> npt.NDArray[np.int64]:
    """Return which of n samples every resample takes, int64 ``[resamples, n]``."""
    return np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))


def spreads(samples: npt.NDArray[np.float64]) -> list[dict[str, float]]:
    """Return ``mean``, ``p90`` and ``max`` of quantities, for what comes in bursts that a median hides.

    Args:
        samples: ``[num_quantities, n]``, n at least 1.
    """
    found = zip(samples.mean(axis=1), np.quantile(samples, 0.9, axis=1), samples.max(axis=1), strict=True)
    return [{"mean": float(mean), "p90": float(p90), "max": float(most)} for mean, p90, most in found]


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
    draws = _draws(len(a))
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
