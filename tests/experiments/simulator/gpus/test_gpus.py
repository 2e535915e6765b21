"""Today's GPUs: the profiles predict what they were not fitted to, and follow from one another where they say so."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields

import numpy as np
import pandas as pd
import pytest

from experiments.compose.compose import compose_point
from experiments.simulator.gpus import assumed, published
from experiments.simulator.gpus.validation import PROFILES, compare_gpus
from harmoeny.hardware import Hardware
from scripts.validate import EXPLAINED, LIMIT_MEDIAN, LIMIT_POINT, OUT
from tests.conftest import ROOT


def profile(name: str) -> Hardware:
    return compose_point("experiment=smoke", f"hardware={name}").hardware


@pytest.fixture(scope="module")
def compared() -> pd.DataFrame:
    return compare_gpus({name: profile(name) for name in PROFILES.values()})


def test_what_nothing_was_fitted_to_is_predicted(compared: pd.DataFrame) -> None:
    held_out = compared[~compared["calibration"]]
    assert len(held_out) == 9 + 2 * 13
    assert held_out["error"].abs().median() <= LIMIT_MEDIAN
    shared = pd.read_csv(ROOT / OUT / "gpu_sweep.csv")
    both = pd.concat([held_out, shared[~shared["calibration"]]])
    far = both[both["error"].abs() > LIMIT_POINT]
    assert Counter((row.system, row.case) for row in far.itertuples()) == EXPLAINED


def test_layers_of_ranks_that_share_a_gpu_are_predicted_within_five_percent(compared: pd.DataFrame) -> None:
    shared = compared[compared["case"].isin(["2 on one H200", "4 on one H200"]) & ~compared["calibration"]]
    assert len(shared) == 8
    assert (shared["error"].abs() < 0.05).all()


def test_balancing_pays_more_the_more_is_skewed(compared: pd.DataFrame) -> None:
    for seen in published.SPEED_UPS:
        assert list(seen.values) == sorted(seen.values)
    for _, rows in compared[compared["unit"] == "speed-up"].groupby("case"):
        assert np.corrcoef(rows["published"], rows["predicted"])[0, 1] > 0.97
        assert rows["predicted"].max() < 8, "eight GPUs"


def test_derived_profiles_differ_only_where_they_say_so() -> None:
    h200, h100 = profile("h200"), profile("dgx_h100")
    differ = {f.name for f in fields(Hardware) if getattr(h200, f.name) != getattr(h100, f.name)}
    memory = {"device_memory_bytes", "device_memory_bytes_per_s"}
    assert differ == memory | {"name", "source", "network_bytes_per_s", "network_latency_s"}
    ratio = h100.device_memory_bytes_per_s / h200.device_memory_bytes_per_s  # type: ignore[operator]
    assert ratio == pytest.approx(3350 / 4800, rel=0.005)
    for name, ranks in (("h200_half", 2), ("h200_quarter", 4)):
        part = profile(name)
        assert part.expert_rate() == pytest.approx(h200.expert_rate() / 1.7 ** np.log2(ranks), rel=0.001)
        assert part.device_memory_bytes == pytest.approx(141e9 / ranks, rel=0.01)


def test_what_is_assumed_of_ultraep_gives_the_published_share_of_balanced_throughput() -> None:
    layers = pd.DataFrame({"m": [160, 160], "num_stages": [1, 2], "layer_s": [1e-3, 0.9e-3]})
    rows = assumed.compare_assumed({name: profile(name) for name in assumed.PROFILES}, layers).set_index("case")
    for imbalance in (1.51, 2.01, 3.03):
        figures = rows.loc[[f"imbalance {imbalance}: {what}" for what in ("afterwards", "share of balanced", "gain")]]
        afterwards, share, gain = figures["simulated"]
        assert afterwards == pytest.approx(1.01, abs=0.02)
        assert share == pytest.approx(0.943, abs=0.02)
        assert 0.85 * imbalance < gain < imbalance, "no more than the imbalance that is gone"
    assert rows.loc["m = 160: two stages to one, time", "published"] == pytest.approx(0.9)
