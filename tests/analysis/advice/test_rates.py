"""Advice under limits, on requests whose answer is planted: every system misses the limit from a known rate on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from analysis.advice.margin import Margin
from analysis.advice.serving import Served, lead_of
from analysis.advice.write import write_advice
from analysis.data.load import Sweep, load_run
from tests.synthetic import change_config, change_manifest, write_rates, write_run

RATES = (4.0, 8.0, 16.0)
#: The limits: 2 s to the first token, 5 s per token after it; every request takes 0.5 s per token.
SLO = {"ttft_s": 2.0, "tpot_s": 5.0, "e2e_s": None, "share": 0.9}
LATENCY_S = {name: [1.0, 1.0] for name in ("static_ep", "harmoeny", "even_split")}


def served(folder: Path, last: Mapping[str, float], slow_s: float = 9.0, fast_s: float = 1.0) -> Sweep:
    """Systems whose requests take ``fast_s`` up to a last rate, and ``slow_s`` at the one after it."""
    ttft_s: dict[tuple[str, float], list[float]] = {}
    for system, rate in last.items():
        kept = [r for r in RATES if r <= rate]
        ttft_s |= {(system, r): [fast_s] * 10 for r in kept}
        if len(kept) < len(RATES):
            ttft_s[system, RATES[len(kept)]] = [fast_s] * 5 + [slow_s] * 5
    write_run(folder, latency_s=LATENCY_S)
    write_rates(folder, ttft_s)
    requests = {"rate_per_s": RATES[0], "per_round": 10, "output_tokens": 3}
    change_config(folder, slo=SLO, requests=requests, batch_size=4, seq_len=8, rounds=2, model={})
    change_manifest(folder, experiment="advise_serving")
    return Sweep(folder, "advise_serving", [load_run(folder)], [{}], [])


def lead(sweep: Sweep, margin: float = 0.1) -> str:
    return lead_of(sweep.runs[0], Served.of(sweep, Margin(margin, "the error", "so it is")).verdicts[0])


def test_the_system_that_keeps_the_limits_longest_is_used(tmp_path: Path) -> None:
    sweep = served(tmp_path, {"static_ep": 4.0, "harmoeny": 16.0, "even_split": 8.0})
    limits = "TTFT up to 2,000 ms, time per output token up to 5,000 ms, for 90% of the requests"
    assert lead(sweep) == (
        f"Use HarMoEny: it keeps the limits ({limits}) up to 16 requests per second or more, static EP up to 4."
    )
    (verdict,) = Served.of(sweep, Margin(0.1, "the error", "so it is")).verdicts
    assert [(one.policy, one.rate) for one in verdict.others] == [("harmoeny", 16.0), ("even_split", 8.0)]
    assert verdict.others[0].certain == pytest.approx(16 / 1.1)
    assert verdict.equals == [], "8 is certainly behind 16 / 1.1"
    assert verdict.static.failing == {"ttft_s": 0.5, "tpot_s": 0.0}, "half of the requests at 8 per second"


def test_a_rate_that_is_kept_by_less_than_the_error_is_no_advice(tmp_path: Path) -> None:
    # 1.9 s keep 2 s, but not if they are 10 % longer.
    sweep = served(tmp_path, {"static_ep": 4.0, "harmoeny": 16.0, "even_split": 4.0}, fast_s=1.9)
    assert lead(sweep, margin=0.01).startswith("Use HarMoEny")
    assert lead(sweep).startswith("Do nothing: static EP keeps the limits")
    # 8 per second are kept with time to spare, but a queue that is slower by 2.5 is one that has 20 per second.
    sweep = served(tmp_path / "other", {"static_ep": 4.0, "harmoeny": 8.0, "even_split": 4.0}, fast_s=0.1)
    assert lead(sweep, margin=0.9).startswith("Use HarMoEny")
    assert "up to 4 requests per second, and no other system certainly" in lead(sweep, margin=1.5)


def test_where_static_ep_is_enough_nothing_is_done(tmp_path: Path) -> None:
    text = lead(served(tmp_path, {"static_ep": 16.0, "harmoeny": 16.0, "even_split": 8.0}))
    assert text.startswith("Do nothing: static EP keeps the limits")
    assert "at all rates that were run, up to 16" in text


def test_where_nobody_keeps_the_limits_the_page_says_what_to_change(tmp_path: Path) -> None:
    text = lead(served(tmp_path, {"static_ep": 0.0, "harmoeny": 0.0, "even_split": 0.0}))
    assert text.startswith("No system keeps the limits")
    assert "at 4 requests per second or more: ask for a lower rate" in text


def test_the_page_of_a_sweep_says_it_with_table_and_figure(tmp_path: Path) -> None:
    page = write_advice(served(tmp_path, {"static_ep": 4.0, "harmoeny": 8.0, "even_split": 4.0}))
    table = page.parts[0].table
    assert table is not None
    assert [list(row) for row in table.rows][:2] == [
        ["HarMoEny", "8", "8", "16", "TTFT: 50%"],
        ["Static EP", "4", "4", "8", "TTFT: 50%"],
    ]
    text = (tmp_path / "advice.md").read_text()
    assert "measured | routing" in text
    assert "![Goodput and latencies by rate](figures/advice_rates.png)" in text
    assert "add fastmoe to system=" in text, "nobody measured how far the same differs"
    assert "A share of 90% needs 36 requests per rate to be certain, and there are 20." in text
    assert "what_if,system,policy,rate" in (tmp_path / "advice.csv").read_text()
