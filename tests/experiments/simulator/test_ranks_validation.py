"""Layers measured by real ranks, some time ago, beside what the simulator says today."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from experiments.compose.compose import compose_point
from experiments.compose.load import load_point
from experiments.simulator.backend import simulate
from experiments.simulator.ranks_validation import (
    NUM_SEEDS,
    case_of,
    measure_runs,
    predict_runs,
    simulated_config,
)
from results_schema.tables import LAYERS

HERE = (
    "experiment=smoke", "rounds=1", "warmup_rounds=0", "hardware=emulated_pcie3", "hardware.expert_flops_per_s=1e10",
    "hardware.all_to_all_bytes_per_s=1e9", "router.skew=0.5", "system=[static_ep,even_split]",
)  # fmt: skip


def test_a_layer_takes_as_long_as_its_slowest_rank(tmp_path: Path) -> None:
    rows = [
        {"system": "a", "round": round_index, "layer": layer, "rank": rank, "layer_s": seconds, "device": "CPU"}
        for round_index, factor in ((0, 1), (1, 3), (2, 2))
        for layer, times in ((0, (1, 5)), (1, (4, 2)))
        for rank, seconds in enumerate(np_times * factor * 1e-3 for np_times in times)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / LAYERS.file)
    point = compose_point(*HERE)
    (row,) = measure_runs([(tmp_path, point)]).to_dict("records")
    # Means over the layers of the slowest rank: 4.5, 13.5 and 9 ms; the median counts.
    assert row == {"system": "a", "case": "skew 0.5", "published": pytest.approx(9.0), "device": "CPU"}


def test_old_configurations_are_simulated_on_the_profile_that_measured() -> None:
    point = compose_point(*HERE)
    config = {name: value for name, value in point.config.items() if name not in ("hardware", "wandb")}
    composed = compose_point(*HERE, "hardware.expert_flops_per_s=2e10").config
    again = load_point(simulated_config(config | {"an_option_of_old": 1}, composed), here=False)
    assert again.simulated
    assert again.hardware.expert_flops_per_s == 2e10
    assert case_of(again) == "skew 0.5"
    slowest = []
    for seed in range(again.options.seed, again.options.seed + NUM_SEEDS):
        seeded = load_point(simulated_config(config | {"seed": seed}, composed), here=False)
        layers = simulate(seeded).tables(seeded)[LAYERS]
        slowest.append(layers[layers["system"] == "static_ep"].groupby("layer")["layer_s"].max().mean() * 1e3)
    measured = pd.DataFrame(
        [
            {"system": s, "case": c, "published": 2.0, "device": "CPU"}
            for s, c in (("static_ep", "skew 0.5"), ("x", "?"))
        ]
    )
    (row,) = predict_runs(measured, [again]).to_dict("records")
    assert row["predicted"] == pytest.approx(np.median(slowest))
    assert row["error"] == pytest.approx(np.median(slowest) / 2 - 1)
