"""All results of a folder: each is drawn into a folder of its own, and what is missing is named with its command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import analysis.figures
from analysis.data.results import find_results
from analysis.data.summary import summarise
from analysis.figures import __main__ as command
from analysis.figures.kit.base import discover
from analysis.figures.kit.result_sets import find_result_sets
from tests.synthetic import change_manifest, change_platform, write_run, write_sweep

SKEWS = [0.0, 0.9]


def write_results(results: Path, *, simulated: bool) -> None:
    folder = write_sweep(results / "skew_sweep", SKEWS)
    if simulated:
        for skew in SKEWS:
            change_platform(folder.parent.parent / f"skew={skew}", "simulator", "dgx1_v100")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    command.main()


def test_measured_and_simulated_figures_of_one_experiment_lie_apart(few: None, tmp_path: Path) -> None:
    for simulated in (False, True):
        write_results(tmp_path / str(simulated), simulated=simulated)
        ((folder, names),) = find_result_sets(tmp_path / str(simulated)).draw(tmp_path / "figures")
        assert names == ["skew_sweep", "time_breakdown"]
        assert folder.parent == tmp_path / "figures" / "skew_sweep"
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        "measured-cpu-of-tests-0123abcd", "simulated-dgx1_v100-0123abcd",
    ]  # fmt: skip


def test_of_a_sweep_the_most_unbalanced_run_gives_the_figures_of_one_run(tmp_path: Path) -> None:
    write_results(tmp_path, simulated=False)
    (found,) = find_result_sets(tmp_path).sets
    (whole, for_sweep), (one, for_run) = found.parts
    assert not for_sweep & for_run
    imbalance = {
        run.manifest["run_id"]: max(entry["imbalance"]["median"] for entry in summarise(run)["systems"].values())
        for run in whole.runs
    }
    assert one.runs[0].manifest["run_id"] == max(imbalance, key=lambda run_id: imbalance[run_id])
    assert f"router.skew={one.runs[0].config['router']['skew']}" in one.caption


def test_single_runs_are_found_unfinished_ones_passed_over_and_damaged_ones_named(few: None, tmp_path: Path) -> None:
    write_results(tmp_path, simulated=False)
    change_manifest(write_run(tmp_path / "single" / "alone").folder, experiment="single")
    change_manifest(write_run(tmp_path / "single" / "failed").folder, status="failed")
    (write_run(tmp_path / "single" / "damaged").folder / "layers.parquet").write_bytes(b"")
    found = find_result_sets(tmp_path)
    assert [str(found.name) for found in found.sets] == [
        "skew_sweep/measured-cpu-of-tests-0123abcd", "single/measured-cpu-of-tests-alone",
    ]  # fmt: skip
    (problem,) = found.unreadable
    assert "single/damaged" in problem


def test_what_is_missing_is_listed_with_its_commands(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "--results", tmp_path, "--out", tmp_path / "figures")
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Not drawn, since no result allows it:",
        "  skew_sweep: python run.py experiment=skew_sweep (about 5 min on two cores)",
        "  skew_sweep: python run.py experiment=paper_skew (simulated, seconds)",
        "  time_breakdown: python run.py experiment=prefetch_ablation (about 1 min on two cores)",
        "  time_breakdown: python run.py experiment=paper_breakdown (simulated, seconds)",
    ]


def test_simulations_fill_the_gaps_once_and_are_called_what_they_are(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def run(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(arguments[2])
        if arguments[2] == "experiment=paper_breakdown":
            return subprocess.CompletedProcess(arguments, 1, "", "error: no such thing")
        write_results(tmp_path, simulated=True)
        return subprocess.CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("analysis.figures.__main__._PAPER", ())
    call(monkeypatch, "--results", tmp_path, "--simulate")
    said = capsys.readouterr().out
    assert sorted(started) == ["experiment=paper_breakdown", "experiment=paper_skew"]
    assert "failed: python run.py experiment=paper_breakdown\nerror: no such thing" in said
    folder = tmp_path / "figures" / "skew_sweep" / "simulated-dgx1_v100-0123abcd"
    assert f"{folder}: skew_sweep, time_breakdown" in said
    assert set(pd.read_csv(folder / "skew_sweep.csv")["router.skew"]) == set(SKEWS)
    assert "Simulated only; on real ranks:\n  skew_sweep: python run.py experiment=skew_sweep (about 5" in said
    assert "Not drawn" not in said
    call(monkeypatch, "--results", tmp_path, "--simulate")
    assert len(started) == 2, "nothing is missing any more"


def test_the_papers_own_figures_are_simulated_beside_measured_ones(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path, simulated=False)
    started = []

    def run(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(arguments[2])
        return subprocess.CompletedProcess(arguments, 1, "", "error: not now")

    monkeypatch.setattr(subprocess, "run", run)
    call(monkeypatch, "--results", tmp_path, "--simulate")
    assert sorted(started) == ["experiment=paper_breakdown", "experiment=paper_skew"]
    change_manifest(write_run(tmp_path / "paper_skew" / "done").folder, experiment="paper_skew")
    call(monkeypatch, "--results", tmp_path, "--simulate")
    assert started[2:] == ["experiment=paper_breakdown"]


def test_help_explains_where_figures_go(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    said = capsys.readouterr().out
    for text in ("<measured or simulated>", "--simulate", "--published", "make figures"):
        assert text in said


def test_every_figure_has_a_name_of_its_own() -> None:
    names = [module.NAME for module in discover()]
    assert len(set(names)) == len(names)


def test_a_module_among_the_figures_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "helper_of_figures.py").write_text('NAME = "helper"\n')
    monkeypatch.setattr("analysis.figures.__path__", [*analysis.figures.__path__, str(tmp_path)])
    with pytest.raises(
        TypeError, match=r"^analysis\.figures\.helper_of_figures: .* lacks SOURCE, missing, table, plot;"
    ):
        discover()


def test_all_results_are_found_below_a_folder_each_once(tmp_path: Path) -> None:
    write_sweep(tmp_path / "deep" / "skew_sweep", SKEWS)
    write_run(tmp_path / "deep" / "single" / "alone")
    change_manifest(write_run(tmp_path / "failed").folder, status="failed")
    change_manifest(write_run(tmp_path / "deep" / "skew_sweep" / "skew=0.5").folder, status="running")
    damaged = write_sweep(tmp_path / "damaged", [0.0])
    (tmp_path / "damaged" / "skew=0.0" / "layers.parquet").write_bytes(b"")
    results = find_results(tmp_path)
    assert [[run.folder.name for run in sweep.runs] for sweep in results.sweeps] == [["skew=0.0", "skew=0.9"]]
    assert [run.folder.name for run in results.single_runs] == ["alone"]
    assert results.unfinished == ["skew=0.5", "failed"]
    (problem,) = results.unreadable
    assert problem.startswith(f"{damaged.parent.parent / 'skew=0.0'}: cannot be read")
