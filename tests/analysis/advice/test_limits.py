"""Who keeps the limits that were asked for, at sizes whose latencies are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.advice.document import Part
from analysis.advice.margin import Margin
from analysis.advice.parts import limits
from analysis.advice.points import Points
from analysis.data.load import Sweep, load_run
from tests.synthetic import change_config, change_manifest, write_run

#: Mean latency over all rounds but the first, by tokens per rank: decode below 512.
LATENCY_S = {
    64: {"static_ep": [9.0, 0.10, 0.14], "even_split": [9.0, 0.04, 0.06], "harmoeny": [9.0, 0.07, 0.09]},
    4096: {"static_ep": [9.0, 3.0, 5.0], "even_split": [9.0, 1.0, 3.0], "harmoeny": [9.0, 1.0, 2.0]},
}


def part(folder: Path, slo: dict[str, Any], scope: str = "model") -> list[Part]:
    runs = []
    for tokens, latency_s in LATENCY_S.items():
        path = folder / str(tokens)
        write_run(path, latency_s=latency_s)
        change_config(path, slo=slo, batch_size=1, seq_len=tokens, spare_slots=None)
        change_manifest(path, scope=scope)
        runs.append(load_run(path))
    sweep = Sweep(folder, "advise", runs, [{"seq_len": tokens} for tokens in LATENCY_S], [])
    return limits(Points.of(sweep, Margin(0.05, "the error", "so it is")))


def rows(found: list[Part]) -> list[list[str]]:
    (one,) = found
    assert one.title == "Limits"
    assert one.table is not None
    return [list(row) for row in one.table.rows]


def test_prefill_keeps_ttft_and_decode_time_per_token(tmp_path: Path) -> None:
    decode, prefill = rows(part(tmp_path, {"ttft_s": 2.0, "tpot_s": 0.09, "e2e_s": None, "share": 0.9}))
    # Means of static EP: 120 ms and 4 s; of even split 50 ms and 2 s; of HarMoEny 80 ms and 1.5 s.
    assert decode == ["64, decode", "90 ms", "120.0 ms", "Even split, HarMoEny"]
    assert prefill == ["4,096, prefill", "2,000 ms", "4,000.0 ms", "HarMoEny, Even split"]


@pytest.mark.parametrize(
    ("limit_s", "within"),
    [(0.049, "nobody"), (0.051, "Even split"), (0.121, "Static EP, Even split, HarMoEny")],
)
def test_who_is_within_changes_with_the_limit(limit_s: float, within: str, tmp_path: Path) -> None:
    (row,) = rows(part(tmp_path, {"tpot_s": limit_s}))
    assert (row[0], row[-1]) == ("64, decode", within), "nothing is said of prefill, which has no limit"


@pytest.mark.parametrize("slo", [{}, {"ttft_s": None, "tpot_s": None, "e2e_s": None, "share": 0.99}, {"e2e_s": 1.0}])
def test_without_limits_of_a_pass_there_is_no_part(slo: dict[str, Any], tmp_path: Path) -> None:
    assert part(tmp_path, slo) == []


def test_layers_alone_have_no_time_to_first_token(tmp_path: Path) -> None:
    (one,) = part(tmp_path, {"ttft_s": 2.0}, scope="layer")
    assert one.table is None
    assert "limits of whole models" in one.text[0]
