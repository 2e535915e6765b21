import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer

from analysis.figures import __main__ as command
from analysis.figures import skew_sweep
from analysis.figures.base import FigureData, discover, draw_all
from analysis.load import Sweep, load_sweep
from analysis.style import _LABELS, _LOOKS, _OTHERS, label, look
from analysis.summary import summarise
from analysis.table import figure_caption, summary_frame
from experiments.discovery import discover as discover_components
from tests.synthetic import SYSTEMS, change_manifest, write_sweep

SKEWS = [0.0, 0.5, 0.9]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return load_sweep(write_sweep(tmp_path_factory.mktemp("results"), SKEWS))


@pytest.fixture(scope="module")
def data(sweep: Sweep) -> FigureData:
    frame = summary_frame(sweep.runs, [summarise(run) for run in sweep.runs], sweep.points)
    return FigureData(frame, ["router.skew"], figure_caption(frame))


def test_every_figure_of_a_sweep_is_written_as_png_pdf_and_csv(data: FigureData, tmp_path: Path) -> None:
    drawn, lacking = draw_all(data, tmp_path / "figures")
    assert lacking == {}
    assert {path.name for path in drawn} == {f"{module.NAME}.png" for module in discover()}
    for path in drawn:
        assert (np.asarray(matplotlib.image.imread(path)).std(axis=(0, 1))[:3] > 0.01).all()  # not blank
        assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF-")
        assert not pd.read_csv(path.with_suffix(".csv")).empty


def test_numbers_behind_the_figure_are_those_of_the_summaries(sweep: Sweep, data: FigureData, tmp_path: Path) -> None:
    draw_all(data, tmp_path)
    rows = pd.read_csv(tmp_path / "skew_sweep.csv").set_index(["router.skew", "system"])
    assert len(rows) == len(SKEWS) * len(SYSTEMS)
    for run, skew in zip(sweep.runs, SKEWS, strict=True):
        for system, entry in summarise(run)["systems"].items():
            for name in ("throughput_tokens_per_s", "ttft_s"):
                found = [rows.loc[(skew, system), f"{name}{end}"] for end in ("", "_low", "_high")]
                assert found == pytest.approx([entry[name][key] for key in ("median", "low", "high")])


def bars_of(axes: Axes) -> dict[str, BarContainer]:
    return {str(c.get_label()): c for c in axes.containers if isinstance(c, BarContainer)}


@pytest.mark.parametrize(("panel", "metric", "scale"), [(0, "throughput_tokens_per_s", 1e-3), (1, "ttft_s", 1.0)])
def test_bars_and_whiskers_have_the_heights_of_the_summaries(
    panel: int, metric: str, scale: float, sweep: Sweep, data: FigureData
) -> None:
    axes = skew_sweep.plot(data).axes[panel]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.5", "0.9"]
    summaries = [summarise(run)["systems"] for run in sweep.runs]
    bars = bars_of(axes)
    assert set(bars) == {"HarMoEny", "Static EP", "Even split", "Drop (drops tokens)"}
    for name, shown in zip(SYSTEMS, bars, strict=True):
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


def test_skews_stand_in_order_whatever_the_order_of_the_runs(sweep: Sweep, data: FigureData) -> None:
    shuffled = FigureData(data.summary.sample(frac=1, random_state=0), data.axes, data.caption)
    axes = skew_sweep.plot(shuffled).axes[0]
    bars = bars_of(axes)["HarMoEny"]
    expected = [summarise(run)["systems"]["harmoeny"]["throughput_tokens_per_s"]["median"] / 1000 for run in sweep.runs]
    assert [patch.get_height() for patch in bars] == pytest.approx(expected)


def test_a_system_that_ran_at_some_skews_only_leaves_gaps(data: FigureData) -> None:
    frame = data.summary[~((data.summary["system"] == "drop") & (data.summary["router.skew"] == 0.5))]
    axes = skew_sweep.plot(FigureData(frame, data.axes, data.caption)).axes[0]
    bars = bars_of(axes)["Drop (drops tokens)"]
    assert [bool(np.isnan(patch.get_height())) for patch in bars] == [False, True, False]


def test_what_results_lack_for_a_figure_is_said_with_the_command_that_gives_it(
    data: FigureData, tmp_path: Path
) -> None:
    one = FigureData(data.summary[data.summary["router.skew"] == 0.5], data.axes, data.caption)
    none = FigureData(data.summary.drop(columns="router.skew"), [], data.caption)
    for lacking in (one, none):
        assert draw_all(lacking, tmp_path / "figures") == (
            [],
            {"skew_sweep": "needs several skews: python run.py experiment=skew_sweep"},
        )
    twice = FigureData(pd.concat([data.summary, data.summary]), data.axes, data.caption)
    _, reasons = draw_all(twice, tmp_path / "figures")
    assert reasons["skew_sweep"].startswith("needs one run per skew")
    assert not (tmp_path / "figures").exists()


class TestStyle:
    def test_no_two_systems_look_the_same(self) -> None:
        looks = [*_LOOKS.values(), *_OTHERS]
        assert len({entry.colour for entry in looks}) == len(looks)
        assert len({entry.marker for entry in looks}) == len(looks)

    def test_every_system_here_has_a_name_for_people(self) -> None:
        assert set(discover_components("system")[0]) <= set(_LABELS)
        assert set(_LABELS) == set(_LOOKS)

    def test_a_newcomer_keeps_its_look(self) -> None:
        assert look("newcomer") == look("newcomer")
        assert look("newcomer") in _OTHERS
        assert label("newcomer") == "newcomer"


class TestCommand:
    def call(self, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
        command.main()

    @pytest.mark.parametrize("what", ["sweep", "runs"])
    def test_draws_a_sweep_or_a_folder_of_runs(
        self, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sweep_dir = write_sweep(tmp_path, SKEWS)
        folder = sweep_dir if what == "sweep" else tmp_path
        self.call(monkeypatch, folder, "--out", tmp_path / "out")
        assert capsys.readouterr().out == f"{tmp_path / 'out' / 'skew_sweep.png'}\n"
        assert set(pd.read_csv(tmp_path / "out" / "skew_sweep.csv")["router.skew"]) == set(SKEWS)

    def test_without_runs_it_says_how_to_get_some(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_sweep(tmp_path, [0.5])
        change_manifest(tmp_path / "skew=0.5", status="failed")
        with pytest.raises(SystemExit):
            self.call(monkeypatch, tmp_path)
        assert f"{tmp_path}: no finished run; python run.py experiment=skew_sweep makes some" in capsys.readouterr().err
