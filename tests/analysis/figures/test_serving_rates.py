"""The figure of serving draws what the open loop says, and says what is missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.text import Text

from analysis.figures import serving_rates
from analysis.figures.kit.base import FigureData, figure_data
from analysis.present.serving_table import build_serving_table, serving_frame, serving_table, share_note
from analysis.present.table import as_text
from tests.analysis.figures.runs import lines_of


def test_lines_are_goodput_and_the_highest_percentile_that_is_supported(rates: FigureData) -> None:
    goodput, ttft, tpot = serving_rates.plot(rates).axes
    frame = serving_rates.table(rates)
    ours, static = "HarMoEny", "Static EP"
    assert lines_of(goodput)[ours] == pytest.approx(frame["goodput_per_s"][frame["system"] == "harmoeny"].tolist())
    assert lines_of(goodput)[ours][2] == 0.0, "0.8 s are above the limit"
    assert lines_of(goodput)["All that arrive"] == [2, 4, 8]
    # 40 requests support the 90th percentile.
    assert lines_of(ttft)[ours] == pytest.approx([200, 400, 800])
    assert lines_of(ttft)[static] == pytest.approx([400, 800]), "it was measured up to the first rate that fails"
    assert lines_of(tpot)[static] == pytest.approx([500, 500])
    assert set(lines_of(ttft)["Limit"]) == {700}
    assert "90th percentile" in ttft.get_ylabel().replace("\n", " ")


def test_caption_says_limits_and_support(rates: FigureData) -> None:
    texts = [str(text.get_text()) for text in serving_rates.plot(rates).findobj(Text) if isinstance(text, Text)]
    said = " ".join(texts).replace("\n", " ")
    assert "TTFT up to 700 ms, TPOT up to 1,000 ms" in said
    assert "p95 72, p99 368. There are 40" in said


def test_one_rate_is_refused(rates: FigureData) -> None:
    run = rates.runs[0]
    assert run.requests is not None
    slow = run.requests[run.requests["rate_per_s"] == 2.0]
    single = figure_data([replace(run, requests=slow)], [{}])
    assert "several rates: python run.py experiment=serving_rates" in str(serving_rates.missing(single))


def test_the_table_says_the_same(rates: FigureData) -> None:
    frame = serving_frame(rates.runs, [{}], [])
    text = as_text(build_serving_table(serving_table(frame, [], rates.runs)))
    assert "gloo, CPU of tests" in text
    assert "Highest rate at which 90% are good: HarMoEny 4/s; Static EP 2/s." in text
    first, second = (line.split() for line in text.splitlines()[2:4])
    assert first == ["TTFT", "TTFT", "TPOT", "TPOT", "ITL", "ITL"]
    assert second[-12:] == ["p50", "ms", "p90", "ms"] * 3
    assert "p99 368" in text
    assert "A share of" not in text, "40 requests are enough for 90 %"
    assert share_note(40, 0.99) == "A share of 99% needs 368 requests per rate to be certain, and there are 40."
    assert share_note(1, 1.0) == ""
    row = next(line for line in text.splitlines() if line.lstrip().startswith("8 "))
    assert "0.0%" in row
    assert np.isnan(frame["ttft_p95_s"]).all()
    swept = serving_frame(rates.runs, [{"what_if": "lean_runtime"}], ["what_if"])
    lines = as_text(build_serving_table(serving_table(swept, ["what_if"], rates.runs))).splitlines()
    for name in ("HarMoEny", "Static EP"):
        assert any(f" {name} " in line for line in lines), "a column more breaks no name"
