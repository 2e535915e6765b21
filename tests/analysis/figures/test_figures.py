import sys
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from analysis.data.breakdown import PARTS
from analysis.data.load import load_run, load_sweep
from analysis.data.summary import summarise
from analysis.figures import __main__ as command
from analysis.figures import dataset_sweep, scale_out, skew_sweep, slots_sweep, threshold_sweep, time_breakdown
from analysis.figures.kit.base import FigureData, FigureModule, discover, draw_all, figure_data
from analysis.present.style import label, look
from analysis.report.reports import report_runs
from tests.synthetic import LATENCY_S, NUM_LAYERS, WORLD_SIZE, Synthetic, change_manifest, write_run, write_sweep

SKEWS = [0.0, 0.5, 0.9]
BARS = {
    "harmoeny": "HarMoEny",
    "static_ep": "Static EP",
    "even_split": "Even split",
    "drop": "Drop (drops tokens)",
}
THRESHOLDS = {"harmoeny_a": 8, "harmoeny_b": 128, "harmoeny": 32}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    loaded = load_sweep(write_sweep(tmp_path_factory.mktemp("results"), SKEWS))
    return figure_data(loaded.runs, loaded.points)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Synthetic:
    """One run with static EP and HarMoEny under three thresholds, one of which was derived."""
    latency_s = {"static_ep": [2.0, 3.0, 4.0], **{name: [1.0, 1.5, t / 64] for name, t in THRESHOLDS.items()}}
    folder = tmp_path_factory.mktemp("results") / "run"
    options = {name: {"threshold": t, "num_slots": t // 8} for name, t in THRESHOLDS.items()}
    run = write_run(folder, latency_s=latency_s, options=options)
    config = folder / "config.yaml"
    text = config.read_text()
    for name in ("threshold: 32", "num_slots: 4"):
        assert text.count(name) == 1
        text = text.replace(name, f"{name.split(':')[0]}: null")
    config.write_text(text)
    return run


@pytest.fixture(scope="module")
def single(written: Synthetic) -> FigureData:
    return figure_data([load_run(written.folder)], [{}])


@pytest.fixture(scope="module")
def scaled(sweep: FigureData) -> FigureData:
    """The sweep as if its runs differed in their number of ranks."""
    ranks = sweep.summary["router.skew"].map(dict(zip(SKEWS, (2, 4, 8), strict=True)))
    frame = sweep.summary.drop(columns="router.skew").assign(world_size=ranks)
    return FigureData(frame, ["world_size"], sweep.caption, sweep.runs)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> FigureData:
    """Two models on two data sets, one of which is slower."""
    folder = tmp_path_factory.mktemp("results")
    points = [{"model": model, "dataset": dataset} for model in ("small", "large") for dataset in ("novels", "random")]
    for i, point in enumerate(points):
        latency_s = {name: [(1 + i) * s for s in seconds] for name, seconds in LATENCY_S.items()}
        write_run(folder / "-".join(point.values()), latency_s=latency_s, seed=i)
    return figure_data([load_run(folder / "-".join(point.values())) for point in points], points)


def test_each_figure_is_drawn_from_the_results_that_it_is_for(
    sweep: FigureData, single: FigureData, scaled: FigureData, texts: FigureData
) -> None:
    ours = {
        "skew_sweep", "policy_sweep", "time_breakdown", "load_balance", "threshold_sweep", "slots_sweep", "scale_out",
        "dataset_sweep", "dataset_policies",
    }  # fmt: skip
    for_sweeps, for_runs, for_scale, for_texts = (
        {module.NAME for module in discover() if module.missing(data) is None} & ours
        for data in (sweep, single, scaled, texts)
    )
    assert for_sweeps == {"skew_sweep", "policy_sweep"}
    assert for_runs == {"time_breakdown", "load_balance", "threshold_sweep", "slots_sweep"}
    assert for_scale == {"scale_out"}
    assert for_texts == {"dataset_sweep", "dataset_policies"}


def test_scale_out_draws_both_metrics_against_the_ranks(scaled: FigureData) -> None:
    throughput, idle = scale_out.plot(scaled).axes
    for axes, column, scale in ((throughput, "throughput_tokens_per_s", 1e-3), (idle, "idle_share", 100.0)):
        lines = {str(line.get_label()): line for line in axes.lines}
        for system, rows in scaled.summary.groupby("system"):
            line = lines[label(str(system)) + ("" if rows["exact"].all() else " (drops tokens)")]
            assert np.asarray(line.get_xdata(), dtype=np.int64).tolist() == [2, 4, 8]
            np.testing.assert_allclose(
                np.asarray(line.get_ydata(), dtype=np.float64), rows.sort_values("world_size")[column] * scale
            )
    perfect = next(line for line in throughput.lines if line.get_label() == "In proportion")
    start, end = np.asarray(perfect.get_ydata(), dtype=np.float64)
    assert end / start == pytest.approx(4)


@pytest.mark.parametrize("kind", ["sweep", "single", "texts"])
def test_figures_are_written_as_png_pdf_and_csv(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    data: FigureData = request.getfixturevalue(kind)
    drawn, lacking = draw_all(data, tmp_path / "figures")
    assert {path.stem for path in drawn} == {module.NAME for module in discover()} - set(lacking)
    for path in drawn:
        assert (np.asarray(matplotlib.image.imread(path)).std(axis=(0, 1))[:3] > 0.01).all()  # not blank
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")
        assert not pd.read_csv(path.with_suffix(".csv")).empty


class TestSkewSweep:
    def test_numbers_behind_it_are_those_of_the_summaries(self, sweep: FigureData, tmp_path: Path) -> None:
        draw_all(sweep, tmp_path, ["skew_sweep"])
        rows = pd.read_csv(tmp_path / "skew_sweep.csv").set_index(["router.skew", "system"])
        assert len(rows) == len(SKEWS) * len(LATENCY_S)
        for run, skew in zip(sweep.runs, SKEWS, strict=True):
            for system, entry in summarise(run)["systems"].items():
                for name in ("throughput_tokens_per_s", "ttft_s"):
                    found = [rows.loc[(skew, system), f"{name}{end}"] for end in ("", "_low", "_high")]
                    assert found == pytest.approx([entry[name][key] for key in ("median", "low", "high")])

    @pytest.mark.parametrize(("panel", "metric", "scale"), [(0, "throughput_tokens_per_s", 1e-3), (1, "ttft_s", 1.0)])
    def test_bars_whiskers_and_bounds_have_the_heights_of_the_summaries(
        self, panel: int, metric: str, scale: float, sweep: FigureData
    ) -> None:
        axes = skew_sweep.plot(sweep).axes[panel]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.5", "0.9"]
        summaries = [summarise(run)["systems"] for run in sweep.runs]
        bars = bars_of(axes)
        assert list(bars) == list(BARS.values())
        for name, shown in BARS.items():
            heights = [patch.get_height() for patch in bars[shown]]
            assert heights == pytest.approx([scale * s[name][metric]["median"] for s in summaries])
            errorbar = bars[shown].errorbar
            assert errorbar is not None
            (whiskers,) = errorbar.lines[2]
            ends = [segment[:, 1].tolist() for segment in whiskers.get_segments()]
            for (low, high), s in zip(ends, summaries, strict=True):
                assert (low, high) == pytest.approx((scale * s[name][metric]["low"], scale * s[name][metric]["high"]))
            # Bars of one skew stand together, at its tick.
            centres = [patch.get_x() + patch.get_width() / 2 for patch in bars[shown]]
            assert [round(centre) for centre in centres] == [0, 1, 2]
            assert to_hex(bars[shown][0].get_edgecolor()) == look(name).colour.lower()
        (bound,) = [
            c for c in axes.collections if isinstance(c, LineCollection) and c.get_label() == "Ideal (reference)"
        ]
        levels = [segment[0, 1] for segment in bound.get_segments()]
        assert levels == pytest.approx([scale * s["ideal"][metric]["median"] for s in summaries])

    def test_skews_stand_in_order_whatever_the_order_of_the_runs(self, sweep: FigureData) -> None:
        shuffled = sweep.summary.sample(frac=1, random_state=0)
        axes = skew_sweep.plot(FigureData(shuffled, sweep.axes, sweep.caption, sweep.runs)).axes[0]
        expected = [summarise(run)["systems"]["harmoeny"]["throughput_tokens_per_s"]["median"] for run in sweep.runs]
        assert [patch.get_height() for patch in bars_of(axes)["HarMoEny"]] == pytest.approx(
            [value / 1000 for value in expected]
        )

    def test_a_system_that_ran_at_some_skews_only_leaves_gaps(self, sweep: FigureData) -> None:
        frame = sweep.summary[~((sweep.summary["system"] == "drop") & (sweep.summary["router.skew"] == 0.5))]
        axes = skew_sweep.plot(FigureData(frame, sweep.axes, sweep.caption, sweep.runs)).axes[0]
        assert [bool(np.isnan(patch.get_height())) for patch in bars_of(axes)["Drop (drops tokens)"]] == [
            False, True, False,
        ]  # fmt: skip

    @pytest.mark.parametrize("repeats", [1, 4])
    def test_legend_names_every_system_once_and_the_bound_last(self, repeats: int, sweep: FigureData) -> None:
        """However many skews there are, and so however the panels stand."""
        skew = sweep.summary["router.skew"]
        frames = [sweep.summary.assign(**{"router.skew": skew + i}) for i in range(repeats)]
        (legend,) = skew_sweep.plot(FigureData(pd.concat(frames), sweep.axes, sweep.caption, sweep.runs)).legends
        assert [text.get_text() for text in legend.get_texts()] == [*BARS.values(), "Ideal (reference)"]

    def test_what_results_lack_is_said_with_the_command_that_gives_it(self, sweep: FigureData) -> None:
        frame = sweep.summary
        for other in (frame[frame["router.skew"] == 0.5], frame.drop(columns="router.skew")):
            axes = [axis for axis in sweep.axes if axis in other]
            reason = skew_sweep.missing(FigureData(other, axes, "", sweep.runs))
            assert reason == "needs several skews: python run.py experiment=skew_sweep"
        twice = skew_sweep.missing(FigureData(pd.concat([frame, frame]), sweep.axes, "", sweep.runs))
        assert twice is not None
        assert twice.startswith("needs one run per skew")


def bars_of(axes: Axes) -> dict[str, BarContainer]:
    return {str(c.get_label()): c for c in axes.containers if isinstance(c, BarContainer)}


class TestDatasetSweep:
    def test_bars_have_the_heights_of_the_summaries(self, texts: FigureData) -> None:
        figure = dataset_sweep.plot(texts)
        summaries = [summarise(run)["systems"] for run in texts.runs]
        for title, runs, metric, scale in (
            ("small: Throughput", summaries[:2], "throughput_tokens_per_s", 1e-3),
            ("large: Time to first token", summaries[2:], "ttft_s", 1.0),
        ):
            (axes,) = [a for a in figure.axes if a.get_title(loc="left").startswith(title)]
            assert [text.get_text() for text in axes.get_xticklabels()] == ["novels", "random"]
            for name, shown in BARS.items():
                heights = [patch.get_height() for patch in bars_of(axes)[shown]]
                assert heights == pytest.approx([scale * s[name][metric]["median"] for s in runs])

    def test_imbalance_of_every_layer_by_hand(self, texts: FigureData) -> None:
        table = dataset_sweep.table(texts).set_index(["model", "dataset", "system", "metric", "layer"])["value"]
        layers = texts.runs[2].layers
        figure = dataset_sweep.plot(texts)
        (axes,) = [a for a in figure.axes if a.get_title(loc="left") == "large, novels"]
        for system, line in zip(dict.fromkeys(layers["system"]), axes.lines, strict=True):
            expected = []
            for layer in range(NUM_LAYERS):
                rows = layers[(layers["system"] == system) & (layers["layer"] == layer)]
                loads = [list(rows.loc[rows["round"] == r, "executed_tokens"]) for r in rows["round"].unique()]
                expected.append(sorted(WORLD_SIZE * max(load) / sum(load) for load in loads)[len(loads) // 2])
            assert [
                table["large", "novels", system, "imbalance", layer] for layer in range(NUM_LAYERS)
            ] == pytest.approx(expected)
            assert list(np.asarray(line.get_ydata())) == pytest.approx(expected)

    def test_one_model_needs_no_axis_of_its_own(self, texts: FigureData) -> None:
        data = figure_data(list(texts.runs[:2]), [{"dataset": "novels"}, {"dataset": "random"}])
        assert dataset_sweep.missing(data) is None
        assert set(dataset_sweep.table(data)["model"]) == set(data.summary["model_name"])

    def test_what_results_lack_is_said(self, texts: FigureData, sweep: FigureData) -> None:
        wanted = "needs several data sets: python run.py experiment=dataset_sweep"
        assert dataset_sweep.missing(sweep) == wanted
        assert dataset_sweep.missing(figure_data(list(texts.runs[:1]), [{"dataset": "novels"}])) == wanted
        points = [{"dataset": "novels", "seed": 1}, {"dataset": "random", "seed": 1}]
        assert dataset_sweep.missing(figure_data(list(texts.runs[:2]), points)) == (
            "needs a sweep over dataset and model only; this one has dataset, seed"
        )


class TestTimeBreakdown:
    def test_parts_by_hand_and_together_the_layer(self, written: Synthetic, single: FigureData) -> None:
        table = time_breakdown.table(single)
        assert len(table) == len(single.runs[0].systems) * WORLD_SIZE
        formulas: dict[str, Callable[[dict[str, Any]], float]] = {
            **{f"{phase}_s": itemgetter(f"{phase}_s") for phase in ("route", "metadata", "plan", "dispatch")},
            "wait for weights_s": lambda row: row["fetch_wait_s"] + row["restore_wait_s"],
            "compute_s": lambda row: row["compute_s"] - row["fetch_wait_s"] - row["restore_wait_s"],
            "idle_s": lambda row: min(row["idle_s"], row["combine_s"]),
            "combine_s": lambda row: max(row["combine_s"] - row["idle_s"], 0),
        }
        for shown in table.to_dict("records"):
            rows = [r for r in written.layers if (r["system"], r["rank"]) == (shown["system"], shown["rank"])]
            for part, formula in formulas.items():
                rounds = [sum(formula(r) for r in rows if r["round"] == i) / NUM_LAYERS for i in range(3)]
                assert shown[part] == pytest.approx(sorted(rounds)[1]), part
        for row in written.layers:
            assert sum(formula(row) for formula in formulas.values()) == pytest.approx(row["layer_s"])

    def test_bars_have_the_widths_of_the_table_and_lie_end_to_end(self, single: FigureData) -> None:
        bars = bars_of(time_breakdown.plot(single).axes[0])
        table = time_breakdown.table(single)
        assert list(bars) == list(PARTS)
        systems = list(single.runs[0].systems)
        rows = table.set_index(["system", "rank"]).loc[[(s, r) for s in systems for r in range(WORLD_SIZE)]]
        ends = np.zeros(len(rows))
        for part, container in bars.items():
            assert [patch.get_x() for patch in container] == pytest.approx(ends)
            widths = [patch.get_width() for patch in container]
            assert widths == pytest.approx((rows[f"{part}_s"] * 1000).tolist())
            ends += widths

    def test_one_run_is_needed(self, sweep: FigureData) -> None:
        assert str(time_breakdown.missing(sweep)).startswith("needs one run: python run.py experiment=")


@pytest.mark.parametrize(
    ("module", "option", "values"),
    [
        (threshold_sweep, "threshold", {"harmoeny_a": 8, "harmoeny": 32, "harmoeny_b": 128}),
        (slots_sweep, "num_slots", {"harmoeny_a": 1, "harmoeny": 4, "harmoeny_b": 16}),
    ],
)
class TestOptionSweep:
    def test_points_are_the_summary_by_the_options_value(
        self, module: FigureModule, option: str, values: dict[str, int], single: FigureData
    ) -> None:
        summary = summarise(single.runs[0])["systems"]
        table = module.table(single)
        assert dict(zip(table["system"], table[option], strict=True)) == values
        assert table[option].is_monotonic_increasing
        assert table.loc[table["derived"], "system"].tolist() == ["harmoeny"]
        for axes in module.plot(single).axes:
            lines = {str(c.get_label()): c for c in axes.containers}
            line = lines["HarMoEny"].lines[0]  # type: ignore[attr-defined]
            assert line.get_xdata().tolist() == list(values.values())
            (metric,) = {
                name
                for name, entry in summary["harmoeny"].items()
                if isinstance(entry, dict)
                and [summary[s][name]["median"] for s in values] == pytest.approx(line.get_ydata().tolist())
            }
            assert metric in table
            (star,) = [drawn for drawn in axes.lines if drawn.get_marker() == "*"]
            assert np.asarray(star.get_xdata()).tolist() == [values["harmoeny"]]
            assert np.asarray(star.get_ydata()).tolist() == pytest.approx([summary["harmoeny"][metric]["median"]])


def test_a_figure_that_fails_takes_no_other_with_it(
    single: FigureData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: FigureData) -> None:
        raise KeyError("gini_low")

    monkeypatch.setattr(time_breakdown, "plot", fail)
    drawn, lacking = draw_all(single, tmp_path, only={"time_breakdown", "load_balance"})
    assert [path.stem for path in drawn] == ["load_balance"]
    assert lacking == {"time_breakdown": "failed: KeyError: 'gini_low'"}
    with pytest.raises(ValueError, match=r"^figure time_breakdown failed: KeyError: 'gini_low'$"):
        report_runs(single.runs, [{}], "title", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").exists(), "all else is there"


def test_a_breakdown_of_many_ranks_fits_on_a_page(single: FigureData) -> None:
    assert "whiskers" not in caption_of(time_breakdown.plot(single))
    (run,) = single.runs
    many = [run.layers.assign(rank=run.layers["rank"] + 2 * k, idle_s=run.layers["idle_s"] + k) for k in range(8)]
    crowded = replace(single, runs=[replace(run, layers=pd.concat(many))])
    figure = time_breakdown.plot(crowded)
    assert figure.get_figheight() < 10
    assert "the ranks that idle least and most" in caption_of(figure)
    assert len(figure.axes[0].get_yticks()) == 2 * len(run.systems)
    assert len(time_breakdown.table(crowded)) == 16 * len(run.systems), "the numbers are all there"


def caption_of(figure: Figure) -> str:
    return " ".join(str(figure.get_supxlabel()).split())


@pytest.mark.parametrize(("module", "option"), [(threshold_sweep, "threshold"), (slots_sweep, "num_slots")])
def test_one_run_with_several_values_is_needed(
    module: FigureModule, option: str, sweep: FigureData, tmp_path: Path
) -> None:
    one = figure_data([load_run(write_run(tmp_path / "run", options={"harmoeny": {option: 3}}).folder)], [{}])
    for lacking in (sweep, one):
        assert str(module.missing(lacking)).endswith(f"python run.py experiment={module.NAME}")


class TestCommand:
    def call(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
        command.main()

    @pytest.mark.parametrize("what", ["sweep", "runs"])
    def test_draws_a_sweep_or_a_folder_of_runs_and_says_what_is_missing_for_more(
        self, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sweep_dir = write_sweep(tmp_path, SKEWS)
        folder = sweep_dir if what == "sweep" else tmp_path
        self.call(monkeypatch, folder, "--out", tmp_path / "out")
        lines = capsys.readouterr().out.splitlines()
        drawn = [Path(line) for line in lines if line.endswith(".png")]
        others = [line for line in lines if line.startswith("not drawn: ")]
        assert len(drawn) + len(others) == len(lines)
        assert {tmp_path / "out" / f"{name}.png" for name in ("policy_sweep", "skew_sweep")} <= set(drawn)
        assert {line.split()[2] for line in others} == {m.NAME for m in discover()} - {path.stem for path in drawn}
        assert all("python run.py experiment=" in line for line in others)
        assert set(pd.read_csv(tmp_path / "out" / "skew_sweep.csv")["router.skew"]) == set(SKEWS)

    def test_without_runs_it_says_how_to_get_some(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_sweep(tmp_path, [0.5])
        change_manifest(tmp_path / "skew=0.5", status="failed")
        with pytest.raises(SystemExit):
            self.call(monkeypatch, tmp_path)
        assert f"{tmp_path}: no finished run; python run.py experiment=skew_sweep makes some" in capsys.readouterr().err
