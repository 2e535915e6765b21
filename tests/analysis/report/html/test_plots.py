from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from plotly import graph_objects

from analysis.present.style import look
from analysis.report.html.plotly_style import looks
from analysis.report.html.plots import Plot, plots_of
from tests.analysis.report.html.results import QUIET_S, good_run, section_of, write_sweep_of
from tests.synthetic import LATENCY_S, write_sweep

METRICS = {
    "throughput_tokens_per_s": ("throughput_tokens_per_s", 1.0),
    "ttft_s": ("ttft_s", 1.0),
}


def drawn(folder: Path) -> dict[str, Plot]:
    plots = {plot.key: plot for plot in plots_of(section_of(folder))}
    for plot in plots.values():
        for figure in plot.variants.values():
            graph_objects.Figure(figure)  # refuses what Plotly does not know
    return plots


def traces(plot: Plot, variant: str = "") -> dict[str, dict[str, Any]]:
    return {trace["meta"]["system"]: trace for trace in plot.variants[variant]["data"]}


def iterations(folder: Path, system: str) -> pd.DataFrame:
    rows = pd.read_parquet(folder / "iterations.parquet")
    return rows[rows["system"] == system].sort_values("round")


def test_few_values_are_groups_of_bars_and_bounds_are_lines(tmp_path: Path) -> None:
    skews = [0.0, 0.5, 0.9]
    plots = drawn(write_sweep(tmp_path, skews))
    assert list(plots) == [
        "throughput_tokens_per_s", "throughput_ratio_to_best_baseline", "ttft_s", "idle_share", "rounds", "breakdown",
    ]  # fmt: skip
    for key in ("throughput_tokens_per_s", "ttft_s"):
        of_system = traces(plots[key])
        assert {name: trace["type"] for name, trace in of_system.items()} == {
            name: "scatter" if name == "ideal" else "bar" for name in LATENCY_S
        }
        for name, trace in of_system.items():
            truth = [iterations(tmp_path / f"skew={skew}", name)[key].median() for skew in skews]
            heights = trace["y"][1::4] if name == "ideal" else trace["y"]
            assert heights == pytest.approx(truth)
    layout = plots["ttft_s"].variants[""]["layout"]
    assert layout["xaxis"]["ticktext"] == ["0", "0.5", "0.9"]


def test_many_numeric_values_are_lines_and_wide_spans_logarithmic(tmp_path: Path) -> None:
    sizes = [64, 2, 4, 8, 16]
    for size in sizes:
        good_run(tmp_path / str(size), {name: [s / size for s in seconds] for name, seconds in QUIET_S.items()})
    folder = write_sweep_of(tmp_path, [{"world_size": size} for size in sizes], [str(size) for size in sizes])
    plot = drawn(folder)["throughput_tokens_per_s"]
    line = traces(plot)["static_ep"]
    assert line["type"] == "scatter"
    assert line["x"] == sorted(sizes)
    assert line["y"] == pytest.approx([1000.0 * size for size in sorted(sizes)])
    layout = plot.variants[""]["layout"]
    assert (layout["xaxis"]["type"], layout["yaxis"]["type"]) == ("log", "log")


def test_second_axis_is_a_choice(tmp_path: Path) -> None:
    points = [{"model": m, "dataset": d} for m in ("small", "large") for d in ("a", "b", "c")]
    ids = [f"{point['model']}-{point['dataset']}" for point in points]
    for i, run_id in enumerate(ids):
        good_run(tmp_path / run_id, {name: [s * (i + 1) for s in seconds] for name, seconds in QUIET_S.items()})
    plots = drawn(write_sweep_of(tmp_path, points, ids))
    plot = plots["throughput_tokens_per_s"]
    assert list(plot.variants) == ["model small", "model large"]
    assert plot.variants["model large"]["layout"]["xaxis"]["ticktext"] == ["a", "b", "c"]
    assert traces(plot, "model large")["static_ep"]["y"] == pytest.approx([1000 / 4, 1000 / 5, 1000 / 6])
    assert len(plots["rounds"].variants) == len(plots["breakdown"].variants) == 6


def test_single_run_has_a_bar_per_system(tmp_path: Path) -> None:
    folder = good_run(tmp_path / "run", LATENCY_S)
    bars = traces(drawn(folder)["throughput_tokens_per_s"])
    assert {name: bar["x"] for name, bar in bars.items()} == {
        name: pytest.approx([iterations(folder, name)["throughput_tokens_per_s"].median()]) for name in LATENCY_S
    }


def test_whiskers_end_where_the_interval_does(tmp_path: Path) -> None:
    section = section_of(good_run(tmp_path / "run", LATENCY_S))
    (plot,) = [plot for plot in plots_of(section) if plot.key == "ttft_s"]
    rows = section.frame.set_index("system")
    for name, bar in traces(plot).items():
        (middle,), error = bar["x"], bar["error_x"]
        ends = middle - error["arrayminus"][0], middle + error["array"][0]
        assert ends == pytest.approx((rows["ttft_s_low"][name], rows["ttft_s_high"][name]))
        assert bar["customdata"][0] == pytest.approx(ends)


def test_one_round_has_no_course(tmp_path: Path) -> None:
    assert "rounds" not in drawn(good_run(tmp_path / "run", {name: [1.0] for name in QUIET_S}))


def test_rounds_are_the_raw_samples(tmp_path: Path) -> None:
    folder = good_run(tmp_path / "run", LATENCY_S)
    lines = traces(drawn(folder)["rounds"], "router skew 0.9")
    for name in LATENCY_S:
        rows = iterations(folder, name)
        assert lines[name]["x"] == rows["round"].tolist()
        assert lines[name]["y"] == pytest.approx(rows["throughput_tokens_per_s"].tolist())


def test_breakdown_adds_up_to_the_layer(tmp_path: Path) -> None:
    folder = good_run(tmp_path / "run", {name: [1.0] for name in QUIET_S})  # one round: medians add up
    (figure,) = drawn(folder)["breakdown"].variants.values()
    layers = pd.read_parquet(folder / "layers.parquet")
    truth = layers.groupby(["system", "rank"])["layer_s"].mean() * 1e3
    keys = [(c[2], int(c[1].removeprefix("rank "))) for c in figure["data"][0]["customdata"]]
    sums = [sum(values) for values in zip(*(trace["x"] for trace in figure["data"]), strict=True)]
    assert sorted(keys) == sorted(truth.index)
    assert sums == pytest.approx([truth[key] for key in keys])


def test_breakdown_of_many_ranks_is_their_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = good_run(tmp_path / "run", {name: [1.0] for name in QUIET_S})
    monkeypatch.setattr("analysis.report.html.plots._MOST_BARS", 3)  # two systems on two ranks are four
    plot = drawn(folder)["breakdown"]
    assert "mean over ranks" in plot.note
    (figure,) = plot.variants.values()
    layers = pd.read_parquet(folder / "layers.parquet").groupby("system")
    for trace, column in ((t, f"{t['name']}_s") for t in figure["data"] if t["name"] in ("route", "plan", "dispatch")):
        names = [c[2] for c in trace["customdata"]]
        assert trace["x"] == pytest.approx([layers[column].mean()[name] * 1e3 for name in names])


def test_system_has_the_colour_of_the_static_figures(tmp_path: Path) -> None:
    plots = drawn(write_sweep(tmp_path, [0.0, 0.9]))
    for key, plot in plots.items():
        if key == "breakdown":
            continue
        for figure in plot.variants.values():
            for trace in figure["data"]:
                name = trace["meta"]["system"]
                marker = trace.get("marker", {})
                seen = {marker.get("color"), marker.get("line", {}).get("color"), trace.get("line", {}).get("color")}
                assert look(name).colour in seen, (key, name)


def test_systems_that_share_a_colour_differ_in_pattern_and_dash() -> None:
    names = [f"variant_{i}" for i in range(8)]
    found = looks(names)
    assert len({style.colour for style in found.values()}) < len(names)
    assert len({(style.colour, style.pattern) for style in found.values()}) == len(names)
    assert len({(style.colour, style.dash) for style in found.values()}) == len(names)


def test_markup_in_a_name_is_text(tmp_path: Path) -> None:
    name = "static_ep_<b>&"
    plots = drawn(good_run(tmp_path / "run", {name: [1.0] * 5, "harmoeny": [0.5] * 5}))
    for key in ("throughput_tokens_per_s", "rounds"):
        (figure,) = plots[key].variants.values()
        assert figure["data"][0]["name"] == "Static EP, &lt;b&gt;&amp;"
