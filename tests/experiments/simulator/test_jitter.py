"""Ranks that differ: drawn from the hardware's spread, the same twice and the same for all systems."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.data.stats import median_interval, paired_ratio
from experiments.compose.compose import compose_point
from experiments.simulator.backend import simulate
from experiments.simulator.jitter import Jitter
from harmoeny.hardware import Hardware
from results_schema.tables import ITERATIONS, LAYERS

BUSY = (
    "experiment=smoke", "backend=simulator", "world_size=2", "rounds=40", "hardware=emulated_pcie3",
    "hardware.expert_flops_per_s=1e6", "hardware.all_to_all_bytes_per_s=1e30", "system=[static_ep,even_split]",
    "systems.even_split.fetch=none", "router=uniform",
    "simulator=runtime", "+simulator.software={static_ep: {plan_s: 0}, even_split: {plan_s: 0}}",
)  # fmt: skip


#: Rank 0 has nine of ten assignments, which the even split deals out.
SKEWED = ("router=skew", "router.skew=0.9", "systems.even_split.fetch=none")


def tables(*overrides: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    point = compose_point(*BUSY, *overrides)
    found = simulate(point).tables(point)
    return found[LAYERS], found[ITERATIONS]


def test_a_pace_has_a_median_of_one_and_the_spread_that_the_hardware_states() -> None:
    jitter = Jitter(Hardware(rank_spread=0.1), 4000, seed=3)
    jitter.begin_round("closed", 0)
    logs = np.log(jitter.pace())
    assert abs(np.median(logs)) < 0.01
    assert abs(logs.std() - 0.1) < 0.01


def test_hardware_without_a_spread_has_equal_ranks() -> None:
    jitter = Jitter(Hardware(), 3, seed=0)
    jitter.begin_round("closed", 0)
    assert jitter.pace().tolist() == [1.0, 1.0, 1.0]


def test_rounds_drift_alike_for_all_systems() -> None:
    _, iterations = tables("hardware.round_spread=0.3")
    latency = iterations.pivot(index="round", columns="system", values="latency_s")
    assert latency["static_ep"].std() / latency["static_ep"].mean() > 0.15
    ratio = latency["static_ep"] / latency["even_split"]
    assert ratio.std() / ratio.mean() < 0.02, "paired, the drift is gone"


def by_system(*overrides: str) -> pd.DataFrame:
    """Return latencies in seconds, rounds by systems."""
    return tables(*overrides)[1].pivot(index="round", columns="system", values="latency_s")


def test_what_differs_in_name_only_differs_in_nothing() -> None:
    latency = by_system(
        "+systems.twin={_target_: baselines.static_ep.StaticEP}",
        "+simulator.software.twin={plan_s: 0}", "hardware.rank_spread=0.3", "hardware.round_spread=0.3",
    )  # fmt: skip
    assert latency["static_ep"].nunique() == len(latency)
    pd.testing.assert_series_equal(latency["static_ep"], latency["twin"], check_names=False, check_exact=True)


def test_ranks_vary_alike_for_all_systems() -> None:
    latency = by_system("hardware.rank_spread=0.2")
    one, ratio = latency["static_ep"], paired_ratio(latency["static_ep"], latency["even_split"])
    alone, other = median_interval(one), median_interval(latency["even_split"])
    assert ratio.high / ratio.low < 1 + 0.2 * (alone.high / alone.low - 1)
    assert ratio.high / ratio.low < alone.high / other.low


@pytest.mark.parametrize("spread", ["rank_spread", "round_spread"])
def test_intervals_are_those_of_the_spread(spread: str) -> None:
    def width(value: float) -> float:
        found = median_interval(by_system(f"hardware.{spread}={value}")["even_split"])
        return found.high / found.low - 1

    none, some, much = (width(value) for value in (0.0, 0.05, 0.2))
    assert none < 0.2 * some
    assert 2 * some < much


def test_balance_gains_on_ranks_that_differ() -> None:
    latency = by_system(*SKEWED, "hardware.rank_spread=0.05")
    ratio = latency["static_ep"] / latency["even_split"]
    assert ratio.min() > 1.2
    same = by_system(*SKEWED)
    assert ratio.median() < (same["static_ep"] / same["even_split"]).median(), "two ranks wait for the slower one"


def test_equally_loaded_ranks_wait_for_the_slower_one() -> None:
    # Of two independent logarithms with spread s, the later one is s / sqrt(pi) behind the median in the mean.
    frames = tables()[0], tables("hardware.rank_spread=0.05")[0]
    even, spread = (frame.query("system == 'even_split'").groupby(["round", "layer"]) for frame in frames)
    assert even["idle_s"].max().max() < 0.02 * even["compute_s"].max().mean()
    slower = spread["compute_s"].max().mean() / even["compute_s"].max().mean() - 1
    assert abs(slower - 0.05 / np.sqrt(np.pi)) < 0.01


def test_another_seed_draws_other_ranks() -> None:
    first, second = (tables("hardware.rank_spread=0.1", "rounds=2", f"seed={seed}")[0] for seed in (0, 1))
    assert (first["compute_s"] != second["compute_s"]).any()
