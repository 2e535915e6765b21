from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.data.stats import Estimate, least_samples, median_interval, median_intervals, paired_ratio, percentile
from tests.strategies import examples

FLOATS = st.floats(0.01, 1000, allow_nan=False)
SAMPLES = st.lists(FLOATS, min_size=1, max_size=12)


@pytest.fixture(autouse=True, scope="module")
def few_resamples() -> None:
    """As many as ever."""


def exact_ends(n: int) -> tuple[int, int]:
    """Places in sorted order (from 0) of the ends of the percentile bootstrap interval of the median, for odd ``n``.

    A resample's median is at most the k-th smallest sample if more than half of its draws are, each with chance k / n.
    """

    def at_most(k: int) -> float:
        p = k / n
        return sum(comb(n, j) * p**j * (1 - p) ** (n - j) for j in range((n + 1) // 2, n + 1))

    low = next(k for k in range(1, n + 1) if at_most(k) >= 0.025)
    high = next(k for k in range(1, n + 1) if at_most(k) >= 0.975)
    return low - 1, high - 1


@pytest.mark.parametrize("n", [3, 5, 7, 11, 17, 27])  # where no end is a matter of the resamples' luck
def test_interval_has_the_ends_that_the_binomial_distribution_gives(n: int) -> None:
    samples = np.random.default_rng(n).permutation(np.arange(n) ** 2)
    low, high = exact_ends(n)
    assert median_interval(samples) == Estimate(median=(n // 2) ** 2, low=low**2, high=high**2, n=n)


def test_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    runs = rng.lognormal(mean=0.0, sigma=0.5, size=(300, 15))  # their true median is 1
    covered = sum(e.low <= 1 <= e.high for e in map(median_interval, runs))
    assert 0.89 * len(runs) <= covered <= 0.99 * len(runs)


@examples()
@given(SAMPLES)
def test_order_does_not_matter_and_the_median_lies_inside(samples: list[float]) -> None:
    estimate = median_interval(samples)
    tiny = 1e-12 * max(samples)  # ends may be interpolated, which rounds
    assert min(samples) <= estimate.low + tiny <= estimate.median + 2 * tiny <= estimate.high + 3 * tiny
    assert estimate.high <= max(samples) + tiny
    assert estimate.median == sorted(samples)[len(samples) // 2] or len(samples) % 2 == 0
    assert estimate.n == len(samples)
    again = median_interval(sorted(samples))
    assert again.median == estimate.median
    if len(samples) % 2:
        # Ends are samples; which ones depends on the resamples only.
        assert all(min(abs(end - x) for x in samples) <= tiny for end in (estimate.low, estimate.high))


@examples()
@given(SAMPLES, st.sampled_from([0.25, 2.0, 1024.0]))
def test_a_change_of_unit_changes_nothing_else(samples: list[float], factor: float) -> None:
    plain, scaled = median_interval(samples), median_interval([x * factor for x in samples])
    for name in ("median", "low", "high"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name) * factor)


def test_it_repeats() -> None:
    samples = np.random.default_rng(1).normal(size=10)
    assert median_interval(samples) == median_interval(samples)


@pytest.mark.parametrize("samples", [[3.0], [3.0, 3.0, 3.0]])
def test_without_spread_the_interval_is_a_point(samples: list[float]) -> None:
    assert median_interval(samples) == Estimate(3.0, 3.0, 3.0, len(samples))


@pytest.mark.parametrize("samples", [[], [1.0, float("nan")], [1.0, float("inf")]])
def test_samples_that_are_no_numbers_are_refused(samples: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^samples: .*, must be at least one finite number$"):
        median_interval(samples)


@examples()
@given(SAMPLES, st.sampled_from([0.5, 1.0, 3.0]))
def test_constant_ratio_is_found_whatever_the_machine_does(samples: list[float], ratio: float) -> None:
    """Rounds may be slow or fast: where one system is always 3 times the other, the ratio is exactly 3."""
    estimate = paired_ratio([ratio * x for x in samples], samples)
    assert (estimate.median, estimate.low, estimate.high) == pytest.approx((ratio, ratio, ratio), rel=1e-12)


@examples()
@given(st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=9))
def test_what_slows_a_whole_round_down_cancels(rounds: list[tuple[float, float, float]]) -> None:
    a, b, slowdown = np.array(rounds).T
    plain, noisy = paired_ratio(a, b), paired_ratio(a * slowdown, b * slowdown)
    assert (noisy.median, noisy.low, noisy.high) == pytest.approx((plain.median, plain.low, plain.high))


def test_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians() -> None:
    # Ratios by round: 10, 1/2, 1/2.
    assert paired_ratio([10, 1, 2], [1, 2, 4]).median == 0.5


def test_unequal_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^numerator: 2 rounds, must be 3 as the denominator has$"):
        paired_ratio([1, 2], [1, 2, 3])


@pytest.mark.filterwarnings("error")
def test_division_by_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least one finite number"):
        paired_ratio([1.0, 0.0], [0.0, 0.0])


@pytest.mark.parametrize("percent", [1, 10, 50, 90, 95, 99])
def test_a_percentile_needs_as_many_samples_as_an_interval_has_ends(percent: float) -> None:
    n, share = least_samples(percent), percent / 100
    for number, enough in ((n, True), (n - 1, False)):
        # All samples on one side of it is what no interval between two of them survives.
        assert (max(share**number, (1 - share) ** number) <= 0.025) == enough
        assert (percentile(np.arange(number), percent) is not None) == enough


@pytest.mark.parametrize(("percent", "n"), [(50, 6), (50, 41), (90, 36), (95, 200), (99, 368), (99, 1000)])
def test_a_percentiles_interval_has_the_ends_that_the_binomial_distribution_gives(percent: int, n: int) -> None:
    share, samples = percent / 100, np.random.default_rng(n).permutation(n).astype(float)
    chance = [comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1)]  # that k samples lie below it
    # Sorted, sample k (from 0) has k before it: above the k-th lies the percentile unless at most k lie below it.
    low = max(k for k in range(n) if sum(chance[: k + 1]) <= 0.025)
    high = min(k for k in range(n) if sum(chance[k + 1 :]) <= 0.025)
    found = percentile(samples, percent)
    assert found is not None
    assert (found.low, found.high) == (low, high)
    assert found.median == pytest.approx(share * (n - 1))
    assert sum(chance[low + 1 : high + 1]) >= 0.95


def test_many_quantities_at_once_have_the_intervals_of_each() -> None:
    samples = np.random.default_rng(3).lognormal(size=(5, 400))  # more than are resampled at a time
    samples[1] = 7.0
    assert median_intervals(samples) == [median_interval(row) for row in samples]
    with pytest.raises(ValueError, match=r"^samples: \[.*inf.*\], must be at least one finite number$"):
        median_intervals(np.array([[1.0, 2.0], [1.0, np.inf]]))
