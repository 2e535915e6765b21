from pathlib import Path

import pandas as pd
import pytest

from analysis.report.html.headline import headline
from tests.analysis.report.html.results import QUIET_S, change_tables, good_run, section_of, write_sweep_of


def test_main_result_is_computed_from_the_tables(tmp_path: Path) -> None:
    latency_s = {"static_ep": [1.0, 2.0, 3.0, 4.0, 8.0], "harmoeny": [0.5, 1.0, 1.2, 2.0, 4.0]}
    folder = good_run(tmp_path / "run", latency_s)
    found = headline(section_of(folder)).main
    assert found is not None
    rows = pd.read_parquet(folder / "iterations.parquet").pivot(index="round", columns="system")
    ratio = rows["throughput_tokens_per_s"]["harmoeny"] / rows["throughput_tokens_per_s"]["static_ep"]
    ttft = rows["ttft_s"]["harmoeny"] / rows["ttft_s"]["static_ep"]
    assert found.throughput.median == pytest.approx(ratio.median())  # 2: in all rounds but one HarMoEny takes half
    assert found.ttft.median == pytest.approx(ttft.median())
    assert (found.throughput.low, found.throughput.high) == pytest.approx((2.0, 2.5))
    layers = pd.read_parquet(folder / "layers.parquet")
    sums = layers.groupby(["system", "iteration"])[["idle_s", "layer_s"]].sum()
    idle = (sums["idle_s"] / sums["layer_s"]).groupby("system").median()
    assert (found.idle, found.baseline_idle) == pytest.approx((idle["harmoeny"], idle["static_ep"]))
    assert found.sentence.startswith(
        "At router skew 0.9, HarMoEny has 2.00 [2.00, 2.50] times the throughput of Static EP, the best exact "
        "baseline: faster. Time to first token -50 % [-60, -50], idle share "
    )


@pytest.mark.parametrize(
    ("factors", "verdict"),
    [
        ([0.8, 0.81, 0.8, 0.79, 0.8], "faster"),
        ([1.2, 1.21, 1.2, 1.19, 1.2], "slower"),
        ([0.8, 1.2, 1.0, 0.9, 1.1], "no clear difference"),
        ([1.0] * 5, "no clear difference"),
        ([0.8, 0.81, 0.8], "faster in these 3 rounds"),
        ([0.5], "no verdict from one round"),
        ([2.0], "no verdict from one round"),
    ],
)
def test_verdict_follows_the_interval(tmp_path: Path, factors: list[float], verdict: str) -> None:
    static = QUIET_S["static_ep"][: len(factors)]
    ours = [f * s for f, s in zip(factors, static, strict=True)]
    found = headline(section_of(good_run(tmp_path / "run", {"static_ep": static, "harmoeny": ours}))).main
    assert found is not None
    assert found.verdict == verdict


def test_sweep_leads_with_its_largest_value_and_tells_the_rest(tmp_path: Path) -> None:
    skews = [0.9, 0.0, 0.5]  # not in order
    for skew in skews:
        ours = [s * (1 - skew / 2) for s in QUIET_S["static_ep"]]
        good_run(tmp_path / str(skew), QUIET_S | {"harmoeny": ours}, skew=skew)
    folder = write_sweep_of(tmp_path, [{"router.skew": s} for s in skews], [str(s) for s in skews])
    found = headline(section_of(folder))
    assert found.main is not None
    assert found.main.point == "router skew 0.9"
    assert found.main.throughput.median == pytest.approx(1 / 0.55)
    assert {result.point: result.throughput.median for result in found.others} == pytest.approx(
        {"router skew 0": 1.0, "router skew 0.5": 1 / 0.75}
    )
    assert found.compared == "HarMoEny against Static EP, at 3 values of router skew (0.9, 0, 0.5)."


def test_long_sweep_tells_the_ends_and_the_extremes(tmp_path: Path) -> None:
    skews = [i / 10 for i in range(8)]
    factor = dict.fromkeys(skews, 0.8) | {0.2: 0.5, 0.4: 1.4}
    for skew in skews:
        ours = [s * factor[skew] for s in QUIET_S["static_ep"]]
        good_run(tmp_path / str(skew), QUIET_S | {"harmoeny": ours}, skew=skew)
    folder = write_sweep_of(tmp_path, [{"router.skew": s} for s in skews], [str(s) for s in skews])
    points = [result.point for result in headline(section_of(folder)).others]
    assert points == [f"router skew {s}" for s in (0, 0.2, 0.4, 0.6)]


def test_what_was_measured_on_is_said(tmp_path: Path) -> None:
    folder = good_run(tmp_path / "run")
    assert headline(section_of(folder)).measured_on == (
        "Measured with gloo on CPU of tests, host link memcpy, 2 ranks; the whole model, switch (8 experts in each of "
        "3 MoE layers, top-1); data set pydoc. Medians of 5 rounds with 95 % bootstrap intervals, ratios paired by "
        "round."
    )
    simulated = good_run(tmp_path / "simulated", backend="simulator", device="dgx")
    change_tables(simulated, backend="simulator", device="dgx")
    assert headline(section_of(simulated)).measured_on.startswith("Simulated, not measured, on dgx, 2 ranks; ")


def test_without_a_pair_the_fastest_exact_system_is_named(tmp_path: Path) -> None:
    found = headline(section_of(good_run(tmp_path / "run", {"drop": [0.1] * 5, "harmoeny": [0.5] * 5})))
    assert found.main is None
    assert found.fallback is not None
    assert "Fastest exact: HarMoEny at router skew 0.9 (2,000 tokens/s)." in found.fallback


def test_static_ep_is_told_too_where_another_baseline_is_better(tmp_path: Path) -> None:
    latency_s = QUIET_S | {"even_split": [0.9 * s for s in QUIET_S["static_ep"]]}
    found = headline(section_of(good_run(tmp_path / "run", latency_s))).main
    assert found is not None
    assert found.throughput.median == pytest.approx(0.9 / 0.8)
    assert "1.12 [1.12, 1.12] times the throughput of Even split" in found.sentence
    assert "(1.25 [1.25, 1.25] times that of Static EP)" in found.sentence
