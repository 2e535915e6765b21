"""The interval of a median against all resamples there are, and what mirrored rounds do to a drift."""

from __future__ import annotations

from itertools import product
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.measure.turns import in_turn
from results_schema.paired import ENOUGH_TO_AVERAGE, median_interval, mirrored_ratio
from tests.strategies import examples

NUM_SYSTEMS = 12


def all_resamples(samples: list[float]) -> tuple[float, float]:
    """Return the interval by making every resample."""
    medians = sorted(median(drawn) for drawn in product(samples, repeat=len(samples)))
    low, high = (medians[int(np.ceil(share * len(medians) - 1e-9)) - 1] for share in (0.025, 0.975))
    return low, high


@examples()
@given(st.lists(st.integers(1, 50).map(float), min_size=1, max_size=6))
def test_the_interval_is_that_of_all_resamples(samples: list[float]) -> None:
    assert median_interval(samples) == pytest.approx(all_resamples(samples))


def times_of_a_run(num_rounds: int, speed_at: np.ndarray, *, mirrored: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Return how long two systems of equal cost take in every round of twelve, on a machine with that speed."""
    taken = np.empty((num_rounds, NUM_SYSTEMS))
    for index in range(num_rounds):
        order = in_turn(range(NUM_SYSTEMS), index if mirrored else index - index % 2, num_rounds)
        begin = index * NUM_SYSTEMS
        taken[index, order] = 1 / speed_at[begin : begin + NUM_SYSTEMS]
    return taken[:, 0], taken[:, 1]


@pytest.mark.parametrize("num_rounds", [8, 9, 20, 21])
@pytest.mark.parametrize("per_pass", [-0.002, 0.003])
def test_a_drift_that_is_linear_cancels(num_rounds: int, per_pass: float) -> None:
    """The clock of a machine whose speed falls, or rises, by the same factor with every pass."""
    speed = np.exp(per_pass * np.arange(num_rounds * NUM_SYSTEMS))
    one, other = times_of_a_run(num_rounds, speed)
    ratio = mirrored_ratio((one / other).tolist(), [True] * num_rounds)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1, 1, 1), abs=1e-12)
    one, other = times_of_a_run(num_rounds, speed, mirrored=False)
    wrong = mirrored_ratio((one / other).tolist(), [True] * num_rounds)
    assert wrong.reach > 0.001, "in one direction alone it does not"


@pytest.mark.parametrize("num_rounds", [6, 9, 12])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(num_rounds: int) -> None:
    """Rounds on a machine that wanders, and with passes that now and then take much longer."""
    rng, covered, num = np.random.default_rng(0), 0, 400
    for _ in range(num):
        passes = num_rounds * NUM_SYSTEMS
        speed = np.exp(np.cumsum(rng.normal(0, 0.02, passes)) + 0.02 * rng.standard_t(4, passes))
        one, other = times_of_a_run(num_rounds, speed)
        ratio = mirrored_ratio((one / other).tolist(), [True] * num_rounds)
        covered += ratio.low <= 1 <= ratio.high
    assert 0.87 * num <= covered <= 0.99 * num


def test_rounds_in_which_the_machine_moved_make_the_interval_longer() -> None:
    ratios = np.random.default_rng(1).lognormal(0, 0.1, 12).tolist()
    all_calm, third_moved, none_calm = (
        mirrored_ratio(ratios, [index >= moved for index in range(12)]) for moved in (0, 4, 12)
    )
    assert third_moved.median == none_calm.median == all_calm.median, "none is left out"
    for moved, factor in ((third_moved, 1.5**0.5), (none_calm, 6**0.5)):
        for end in ("low", "high"):
            before, after = (np.log(getattr(ratio, end) / ratio.median) for ratio in (all_calm, moved))
            assert after == pytest.approx(factor * before)


def test_few_rounds_are_samples_themselves() -> None:
    few = [1.0, 1.21, 1.1][: ENOUGH_TO_AVERAGE - 1]
    assert mirrored_ratio(few, [True] * 3).median == 1.1
    assert mirrored_ratio([1.3], [True]) == (1.3, 1.3, 1.3, 1)
