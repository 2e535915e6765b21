"""Points are compared round by round only where the same ranks measured them together."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.data.load import Run, Sweep, load_run, load_sweep
from analysis.data.pairing import ratios_to_no_skew, run_ratio
from analysis.data.stats import Estimate, paired_ratio
from analysis.data.summary import summarise
from analysis.figures import skew_sweep
from analysis.figures.kit.base import figure_data
from analysis.present.table import as_text, build_table, noise_notes
from analysis.report.html.headline import headline
from analysis.report.html.section import split_sections
from results_schema.manifest import SIMULATOR
from results_schema.paired import mirrored_ratio
from tests.synthetic import LATENCY_S, change_manifest, write_sweep

SKEWS = [0.0, 0.5, 0.9]


def group(folder: Path, run_ids: list[str], identity: str = "one") -> None:
    for run_id in run_ids:
        change_manifest(folder / run_id, group={"id": identity, "run_ids": run_ids, "mirrored": True})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Points of which every round takes 1 + skew times as long as without skew."""
    write_sweep(tmp_path, SKEWS)
    group(tmp_path, [f"skew={skew}" for skew in SKEWS])
    return tmp_path


def sweep_of(results: Path) -> Sweep:
    (folder,) = results.glob("sweeps/*")
    return load_sweep(folder)


def test_every_system_is_compared_with_the_best_exact_one_without_skew(results: Path) -> None:
    found = {
        (run.config["router"]["skew"], system): (ratio, is_best)
        for run, system, ratio, is_best in ratios_to_no_skew(sweep_of(results).runs)
    }
    assert set(found) == {(skew, system) for skew in SKEWS for system in LATENCY_S}
    assert [key for key, (_, is_best) in found.items() if is_best] == [(0.0, "harmoeny")], "drop and ideal do not count"
    for (skew, system), (ratio, _) in found.items():
        by_round = [
            best / ((1 + skew) * own) for best, own in zip(LATENCY_S["harmoeny"], LATENCY_S[system], strict=True)
        ]
        expected = mirrored_ratio(by_round, [True] * 5)
        assert (ratio.median, ratio.low, ratio.high) == pytest.approx(expected[:3])
    assert found[0.5, "harmoeny"][0].low == pytest.approx(1 / 1.5), "the same in every round"


def test_rounds_of_another_measurement_are_no_pairs(results: Path) -> None:
    group(results, ["skew=0.9"], "two")
    assert {run.config["router"]["skew"] for run, *_ in ratios_to_no_skew(sweep_of(results).runs)} == {0.0, 0.5}
    group(results, ["skew=0.0"], "three")
    assert {run.config["router"]["skew"] for run, *_ in ratios_to_no_skew(sweep_of(results).runs)} == {0.0}
    for skew in SKEWS:
        path = results / f"skew={skew}" / "manifest.json"
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in manifest.items() if name != "group"}))
    assert list(ratios_to_no_skew(sweep_of(results).runs)) == [], "nobody knows of earlier versions' runs"


def test_points_that_were_measured_apart_are_named(results: Path) -> None:
    sweep = sweep_of(results)
    assert noise_notes(sweep.runs, sweep.points) == []
    group(results, ["skew=0.9"], "resumed")
    sweep = sweep_of(results)
    (note,) = noise_notes(sweep.runs, sweep.points)
    assert note.startswith("Measured apart from no skew, so not compared with it: skew=0.9 (")
    assert noise_notes(sweep.runs[1:], sweep.points[1:]) == [], "there is no point without skew"


def test_table_figure_and_headline_show_the_ratio(results: Path) -> None:
    sweep = sweep_of(results)
    data = figure_data(sweep.runs, sweep.points)
    text = as_text(build_table(data.summary, data.axes, "title"))
    assert "to best at no skew" in text
    assert sum("0.53 [0.53, 0.53]" in line for line in text.splitlines()) == 1, "HarMoEny at 0.9"
    assert text.count("= 1.00 [1.00, 1.00]") == 3 + 1, "the best baseline of every point, and of all at no skew"
    drawn = skew_sweep.table(data).set_index(["router.skew", "system"])
    assert drawn.loc[(0.9, "harmoeny"), "throughput_ratio_to_no_skew"] == pytest.approx(1 / 1.9)
    assert len(skew_sweep.plot(data).axes) == 3
    (section,) = split_sections(sweep.runs, sweep.points, data.summary, "title")
    main = headline(section).main
    assert main is not None
    assert "It has 0.53 [0.53, 0.53] times that of the best system at no skew." in main.sentence


def test_where_nothing_was_measured_together_nothing_is_added(results: Path) -> None:
    for skew in SKEWS:
        group(results, [f"skew={skew}"], f"alone at {skew}")
    sweep = sweep_of(results)
    data = figure_data(sweep.runs, sweep.points)
    assert "at no skew" not in as_text(build_table(data.summary, data.axes, "title"))
    assert len(skew_sweep.plot(data).axes) == 2


def test_simulations_are_compared_with_even_routing_whenever_they_ran(results: Path) -> None:
    runs = sweep_of(results).runs
    for run in runs:
        del run.manifest["group"]
        run.manifest["backend"] = SIMULATOR
    runs[0].manifest["point"] = {"router": "uniform"}
    runs[0].config["router"] = {"name": "uniform"}
    runs[0].config["results_dir"] = "elsewhere"
    assert noise_notes(runs, [{}] * 3) == []
    runs[2].config["seq_len"] = 7  # another point, which no even one belongs to
    assert "so not compared with it" in noise_notes(runs, [{}] * 3)[0]
    found = {(runs.index(run), system): ratio.median for run, system, ratio, _ in ratios_to_no_skew(runs)}
    assert set(found) == {(index, system) for index in (0, 1) for system in LATENCY_S}
    assert found[1, "harmoeny"] == pytest.approx(1 / 1.5)


@pytest.fixture
def run(results: Path) -> Run:
    return load_run(results / "skew=0.0")


def test_only_mirrored_rounds_are_averaged(run: Run) -> None:
    ratios = {i: 1.0 + i % 3 / 10 for i in range(9)}
    one, other = pd.Series(ratios), pd.Series(dict.fromkeys(ratios, 1.0))
    assert run_ratio(run, one, other) == Estimate(*mirrored_ratio(list(ratios.values()), [True] * 9))
    run.manifest["group"]["mirrored"] = False
    assert run_ratio(run, one, other) == paired_ratio(one, other)
    del run.manifest["group"]
    assert run_ratio(run, one, other) == paired_ratio(one, other)
    assert summarise(run)["systems"]["static_ep"]["throughput_ratio_to_best_baseline"]["median"] == 1


def test_rounds_of_different_numbers_are_not_mixed(run: Run) -> None:
    assert run_ratio(run, pd.Series({0: 2.0, 1: 3.0}), pd.Series({1: 1.0, 0: 2.0, 2: 9.0})).n == 2
    with pytest.raises(ValueError, match="at least one finite number above 0"):
        run_ratio(run, pd.Series({0: 2.0}), pd.Series({1: 1.0}))
