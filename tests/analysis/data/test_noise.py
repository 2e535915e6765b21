"""What a sweep tells of its own noise: rounds in which the machine moved, and how far equal systems come out apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.data.load import load_run
from analysis.data.pairing import moved_rounds, ratios_to_no_skew, run_ratio, throughput
from analysis.data.twins import twins_of
from analysis.figures import skew_sweep
from analysis.figures.kit.base import figure_data
from analysis.present.table import noise_notes
from analysis.report.html.plots import plots_of
from analysis.report.html.section import Section, split_sections
from analysis.report.html.warnings import warnings_of
from tests.synthetic import change_manifest, write_run

NUM_ROUNDS = 10
RNG = np.random.default_rng(0)
LATENCY_S = {
    "harmoeny": (0.5 * RNG.lognormal(0, 0.03, NUM_ROUNDS)).tolist(),
    "static_ep": RNG.lognormal(0, 0.03, NUM_ROUNDS).tolist(),
    "static_ep_again": RNG.lognormal(0, 0.03, NUM_ROUNDS).tolist(),
}


def write_yardstick(folder: Path, moved: Sequence[int], *, column: str = "product_s", rank: int = 1) -> None:
    """Let the yardstick of one rank take a sixth longer at the end of some rounds, and a tenth of that in all."""
    rows = [
        {"round": r, "moment": m, "rank": k, "product_s": 0.01, "copy_s": 0.005}
        | ({column: 0.01 * (1 + (1 / 6 if r in moved else 1 / 60) * m)} if k == rank else {})
        for r in range(NUM_ROUNDS)
        for m in range(2)
        for k in range(2)
    ]
    platform = {"backend": "gloo", "device": "CPU of tests", "host_link": "memcpy"}
    pd.DataFrame(rows).assign(**platform).to_parquet(folder / "yardstick.parquet", index=False)


def write(folder: Path, *, skew: float, moved: Sequence[int] = (), same: bool = True) -> None:
    write_run(folder, latency_s={name: [(1 + skew) * s for s in taken] for name, taken in LATENCY_S.items()}, skew=skew)
    write_yardstick(folder, moved)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, kind in manifest["systems"].items():
        kind["behaviour"] = kind["policy"] if same else name
    change_manifest(
        folder, group={"id": "one", "run_ids": [], "mirrored": True}, systems=manifest["systems"], git={"revision": "0"}
    )


@pytest.mark.parametrize("column", ["product_s", "copy_s"])
def test_a_round_moved_where_either_part_on_any_rank_did(tmp_path: Path, column: str) -> None:
    write(tmp_path, skew=0.0)
    assert moved_rounds(load_run(tmp_path)) == []
    write_yardstick(tmp_path, [2, 7], column=column)
    assert moved_rounds(load_run(tmp_path)) == [2, 7]
    (tmp_path / "yardstick.parquet").unlink()
    assert moved_rounds(load_run(tmp_path)) == [], "earlier versions had none"


def test_intervals_are_longer_by_the_rounds_in_which_the_machine_moved(tmp_path: Path) -> None:
    write(tmp_path, skew=0.0)
    quiet = load_run(tmp_path)
    ours, static = (throughput(quiet, name) for name in ("harmoeny", "static_ep"))
    before = run_ratio(quiet, ours, static)
    write_yardstick(tmp_path, [0, 1, 4])  # of five samples (0, 1), (2, 3), ... two
    after = run_ratio(load_run(tmp_path), ours, static)
    assert after.median == before.median
    for end in ("low", "high"):
        assert np.log(getattr(after, end) / after.median) == pytest.approx(
            (5 / 3) ** 0.5 * np.log(getattr(before, end) / before.median)
        )


def test_a_ratio_across_points_minds_the_machine_at_both(tmp_path: Path) -> None:
    reach = []
    for name, moved in (("quiet", ((), ())), ("at 0", ((0,), ())), ("at both", ((0,), (2,)))):
        write(tmp_path / name / "even", skew=0.0, moved=moved[0])
        write(tmp_path / name / "skewed", skew=0.9, moved=moved[1])
        runs = [load_run(tmp_path / name / part) for part in ("even", "skewed")]
        (ratio,) = (r for run, system, r, _ in ratios_to_no_skew(runs) if run is runs[1] and system == "static_ep")
        reach.append(np.log(ratio.high / ratio.low))
    assert reach[1] == pytest.approx((5 / 4) ** 0.5 * reach[0])
    assert reach[2] == pytest.approx((5 / 3) ** 0.5 * reach[0])


def section_of(results: Path, **options: object) -> Section:
    for skew in (0.0, 0.9):
        write(results / str(skew), skew=skew, **options)  # type: ignore[arg-type]
    runs = [load_run(results / str(skew)) for skew in (0.0, 0.9)]
    points = [{"router.skew": skew} for skew in (0.0, 0.9)]
    (section,) = split_sections(runs, points, figure_data(runs, points).summary, "title")
    return section


def test_equal_systems_are_found_by_what_they_are_and_shown_as_the_error_bar(tmp_path: Path) -> None:
    section = section_of(tmp_path)
    (twins,) = twins_of(section.runs)
    assert (twins.one, twins.other) == ("static_ep", "static_ep_again")
    one, other = (throughput(section.runs[0], name) for name in ("static_ep", "static_ep_again"))
    assert twins.ratios[0] == run_ratio(section.runs[0], one, other)
    assert twins.low <= twins.ratios[0].median <= twins.high
    (note,) = noise_notes(section.runs, section.points)
    assert note.startswith("Error bar: Static EP and ")
    assert f"within [{twins.low:.2f}, {twins.high:.2f}]" in note
    (alert,) = (alert for alert in warnings_of(section) if "error bar" in alert.title)
    assert alert.level == ("note" if all(ratio.low <= 1 <= ratio.high for ratio in twins.ratios) else "warning")
    data = figure_data(section.runs, section.points)
    figure = skew_sweep.plot(data)
    (band,) = figure.axes[1].patches[-1:]
    assert band.get_extents().y0 < band.get_extents().y1
    assert not any("error bar" in alert.title for alert in warnings_of(section_of(tmp_path / "other", same=False)))


def test_equal_systems_that_come_out_apart_are_a_warning(tmp_path: Path) -> None:
    section = section_of(tmp_path)
    for run in section.runs:
        slower = run.iterations["system"] == "static_ep_again"
        run.iterations.loc[slower, "throughput_tokens_per_s"] *= 0.8
    (alert,) = (alert for alert in warnings_of(section) if "error bar" in alert.title)
    assert alert.level == "warning"
    assert alert.text.endswith("Do not believe differences as small as this one.")


def test_the_report_marks_rounds_and_draws_the_drift(tmp_path: Path) -> None:
    quiet = section_of(tmp_path / "quiet")
    assert "The machine moved" not in {alert.title for alert in warnings_of(quiet)}
    for moved, level in (([3], "note"), ([1, 3, 5], "warning")):
        section = section_of(tmp_path / level, moved=moved)
        (alert,) = (alert for alert in warnings_of(section) if alert.title == "The machine moved")
        assert alert.level == level
        assert f"({', '.join(map(str, moved))})" in alert.text
        (plot,) = (plot for plot in plots_of(section) if plot.key == "yardstick")
        figure = plot.variants["router skew 0"]
        assert len(figure["layout"]["shapes"]) == len(moved)
        assert len(figure["data"][0]["x"]) == 2 * NUM_ROUNDS
        assert max(figure["data"][0]["y"]) > 1.1
    (note,) = (note for note in noise_notes(section.runs, section.points) if "moved" in note)
    assert "3 of 10 at skew=0.0, 3 of 10 at skew=0.9" in note


def test_a_goal_that_was_missed_is_told(tmp_path: Path) -> None:
    section = section_of(tmp_path)
    until = {"asked": 0.02, "rounds": 45, "reach": 0.0312, "ended_by": "max_rounds"}
    for run in section.runs:
        run.manifest["until"] = until
    text = "until=0.02 was not reached: intervals reach 3.1% after 45 rounds (max_rounds)."
    assert noise_notes(section.runs, section.points).count(text) == 1
    assert [alert.text for alert in warnings_of(section) if alert.title == "Wider than asked for"] == [text]
    for run in section.runs:
        run.manifest["until"] = until | {"ended_by": "until"}
    assert text not in noise_notes(section.runs, section.points)
