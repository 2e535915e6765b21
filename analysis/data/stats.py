"""Medians and paired ratios with bootstrap 95 % intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: From so many rounds on an interval covers the true median in 90 % of all experiments (docs/metrics.md).
ENOUGH_ROUNDS = 5
_RESAMPLES = 2000


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
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
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
