"""Ranks that differ: drawn from the hardware's spread, the same twice, shared by systems where the machine drifts."""

from __future__ import annotations

import numpy as np
import pandas as pd

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


def tables(*overrides: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    point = compose_point(*BUSY, *overrides)
    found = simulate(point).tables(point)
    return found[LAYERS], found[ITERATIONS]


def test_a_pace_has_a_median_of_one_and_the_spread_that_the_hardware_states() -> None:
    jitter = Jitter(Hardware(rank_spread=0.1), 4000, seed=3, system="a")
    jitter.begin_round("closed", 0)
    logs = np.log(jitter.pace())
    assert abs(np.median(logs)) < 0.01
    assert abs(logs.std() - 0.1) < 0.01


def test_hardware_without_a_spread_has_equal_ranks() -> None:
    jitter = Jitter(Hardware(), 3, seed=0, system="a")
    jitter.begin_round("closed", 0)
    assert jitter.pace().tolist() == [1.0, 1.0, 1.0]


def test_rounds_drift_alike_for_all_systems() -> None:
    _, iterations = tables("hardware.round_spread=0.3")
    latency = iterations.pivot(index="round", columns="system", values="latency_s")
    assert latency["static_ep"].std() / latency["static_ep"].mean() > 0.15
    ratio = latency["static_ep"] / latency["even_split"]
    assert ratio.std() / ratio.mean() < 0.02, "paired, the drift is gone"


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
