import os
import re
from pathlib import Path

import pytest
from matplotlib.container import BarContainer

from analysis.explore import draw, load_results, of_run
from tests.synthetic import change_manifest, write_run, write_sweep


def test_newest_sweep_of_an_experiment_is_taken(tmp_path: Path) -> None:
    older = write_sweep(tmp_path / "old", [0.0, 0.5])
    newer = write_sweep(tmp_path / "new", [0.0, 0.9])
    os.utime(older / "sweep.json", (0, 0))
    assert load_results(tmp_path).summary["router.skew"].unique().tolist() == [0.0, 0.9]
    assert load_results(older).summary["router.skew"].unique().tolist() == [0.0, 0.5]
    for name in ("skew=0.0", "skew=0.9"):
        change_manifest(newer.parent.parent / name, status="failed")
    assert load_results(tmp_path).summary["router.skew"].unique().tolist() == [0.0, 0.5], "one with finished runs"


def test_runs_without_a_sweep_are_taken_together(tmp_path: Path) -> None:
    for skew in (0.25, 0.75):
        write_run(tmp_path / f"run{skew}", skew=skew)
    data = load_results(str(tmp_path))
    assert data.axes == ["router.skew"]
    assert [run.folder.name for run in data.runs] == ["run0.25", "run0.75"]
    assert load_results(tmp_path / "run0.75").summary["router.skew"].unique().tolist() == [0.75]


@pytest.mark.parametrize("make", [False, True], ids=["no folder", "empty folder"])
def test_no_results_are_one_sentence_with_the_command(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "results"
    if make:
        folder.mkdir()
    message = f"{folder}: no finished run in it; make some in the repository's root: python run.py experiment=x"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_results(folder, "python run.py experiment=x")


def test_figures_are_drawn_by_name_or_refused_with_the_reason(tmp_path: Path) -> None:
    data = load_results(write_sweep(tmp_path, [0.0, 0.9]))
    throughput, _ = draw("skew_sweep", data).axes
    drawn = [bars for bars in throughput.containers if isinstance(bars, BarContainer)]
    heights = sorted(bar.get_height() for bars in drawn for bar in bars.patches)
    systems = data.summary[data.summary["bound"] == False]  # noqa: E712
    assert heights == pytest.approx(sorted(systems["throughput_tokens_per_s"] / 1000))
    with pytest.raises(ValueError, match=r"^time_breakdown: needs one run: python run.py "):
        draw("time_breakdown", data)
    assert draw("time_breakdown", of_run(data.runs[0])).axes
    with pytest.raises(ValueError, match=r"^figure: 'pie', must be one of .*skew_sweep.*time_breakdown"):
        draw("pie", data)
