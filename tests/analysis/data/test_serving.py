"""Goodput, throughput and percentiles of the open loop, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.data.load import Run, load_run
from analysis.data.serving import limits_of, max_rates, rates_of, unsupported
from tests.synthetic import change_config, write_rates, write_run, write_serving

SYSTEMS = {"harmoeny": [1.0] * 5, "static_ep": [1.0] * 5}


def run(folder: Path, slo: dict[str, Any] | None = None, **rates: Any) -> Run:
    write_run(folder, latency_s=SYSTEMS)
    write_rates(folder, **rates)
    change_config(folder, slo=slo or {})
    return load_run(folder)


#: Ten requests: nine at once, one after 5 s.
TEN = [0.5] * 9 + [5.0]


def test_goodput_is_what_keeps_all_limits_over_the_rounds_length(tmp_path: Path) -> None:
    one = run(tmp_path / "run", {"ttft_s": 1.0, "tpot_s": None}, ttft_s={("static_ep", 2.0): TEN})
    (row,) = rates_of(one).to_dict("records")
    # Round 0 ends with request 9: it arrives at 10 s, has a token at 15 s and its last at 16 s; round 1 ends at 17 s.
    assert row["requests_per_s"] == pytest.approx(20 / 33)
    assert row["output_tokens_per_s"] == pytest.approx(60 / 33)
    assert row["goodput_per_s"] == pytest.approx(18 / 33)
    assert row["goodput_per_s"] == pytest.approx(row["requests_per_s"] * row["good_share"])
    assert (row["requests_per_s_low"], row["requests_per_s_high"]) == pytest.approx((10 / 17, 10 / 16))
    assert row["good_share"] == 0.9
    assert (row["num_requests"], row["num_rounds"]) == (20, 2)


@pytest.mark.parametrize(
    ("slo", "share"),
    [
        ({"ttft_s": 5.0}, 1.0),
        ({"ttft_s": 0.4}, 0.0),
        ({"tpot_s": 0.5}, 1.0),
        ({"tpot_s": 0.49}, 0.0),
        ({"e2e_s": 1.5}, 0.9),
        ({"e2e_s": 1.4}, 0.0),
        ({"ttft_s": 5.0, "tpot_s": 0.49}, 0.0),
    ],
)
def test_every_limit_counts(slo: dict[str, Any], share: float, tmp_path: Path) -> None:
    frame = rates_of(run(tmp_path / "run", slo, ttft_s={("static_ep", 2.0): TEN}))
    assert frame["good_share"].tolist() == [share]


def test_without_limits_there_is_no_goodput(tmp_path: Path) -> None:
    one = run(tmp_path / "run", ttft_s={("static_ep", 2.0): TEN})
    assert limits_of(one) == {}
    assert not {"good_share", "goodput_per_s"} & set(rates_of(one))


def test_percentiles_by_hand_and_only_where_requests_support_them(tmp_path: Path) -> None:
    times = list(np.arange(1, 101) / 100)
    frame = rates_of(run(tmp_path / "run", ttft_s={("static_ep", 2.0): times, ("harmoeny", 2.0): times[:10]}))
    many, few = (frame.set_index("system").loc[name] for name in ("static_ep", "harmoeny"))
    # 200 requests, every hundredth of a second twice: the 95th percentile lies at place 0.95 * 199 = 189.05.
    assert many["ttft_p95_s"] == pytest.approx(0.95 + 0.05 * 0.01)
    assert many["ttft_p95_s_low"] < many["ttft_p95_s"] < many["ttft_p95_s_high"]
    assert many["ttft_mean_s"] == pytest.approx(0.505)
    assert many["e2e_p50_s"] == pytest.approx(many["ttft_p50_s"] + 1)
    assert (many["tpot_p90_s"], many["itl_mean_s"], many["itl_p50_s"], many["itl_p90_s"]) == (0.5, 0.5, 0.5, 0.75)
    assert np.isnan(many["ttft_p99_s"])
    assert np.isnan(many["itl_p99_s"]), "400 gaps, but of 200 requests"
    assert not np.isnan(few["ttft_p50_s"])
    assert np.isnan([few["ttft_p90_s"], few["ttft_p95_s"], few["itl_p90_s"]]).all()
    assert unsupported(frame) == [90, 95, 99]


def test_the_highest_rate_is_the_last_before_the_first_that_fails(tmp_path: Path) -> None:
    good, bad = [0.5] * 10, [0.5] * 8 + [5.0] * 2
    shares = {"static_ep": (good, bad, good), "harmoeny": (good, TEN, bad)}
    ttft_s = {(name, 2.0**k): times for name, of_rate in shares.items() for k, times in enumerate(of_rate)}
    frame = rates_of(run(tmp_path / "run", {"ttft_s": 1.0}, ttft_s=ttft_s))
    assert max_rates(frame, 0.9) == {"harmoeny": 2.0, "static_ep": 1.0}
    assert max_rates(frame, 0.95) == {"harmoeny": 1.0, "static_ep": 1.0}
    assert max_rates(frame.query("rate_per_s > 2"), 0.9) == {"harmoeny": 0.0, "static_ep": 4.0}


def test_runs_of_earlier_revisions_have_one_rate_and_one_token(tmp_path: Path) -> None:
    write_run(tmp_path / "run", latency_s=SYSTEMS)
    write_serving(tmp_path / "run", list(SYSTEMS), 5)
    change_config(tmp_path / "run", requests={"arrivals": "poisson", "rate_per_s": 7.0})
    frame = rates_of(load_run(tmp_path / "run"))
    assert frame["rate_per_s"].tolist() == [7.0, 7.0]
    assert frame["ttft_p50_s"].tolist() == pytest.approx([7.0, 7.0])
    assert not any(name.startswith(("tpot", "itl")) for name in map(str, frame.columns))


def test_without_an_open_loop_there_is_nothing(tmp_path: Path) -> None:
    assert rates_of(load_run(write_run(tmp_path / "run").folder)).empty
