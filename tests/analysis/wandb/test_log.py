import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb

from analysis.data.load import Run, load_run, load_sweep
from analysis.data.metrics import METRICS, per_iteration
from analysis.data.summary import summarise, write_summary
from analysis.present.table import skew_points, summary_frame
from analysis.report.reports import save_tables
from analysis.wandb.log import is_logged, log_run, log_sweep, sweep_group
from tests.analysis.wandb.records import read_back
from tests.synthetic import change_manifest, write_run, write_sweep

pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("no_account", "few")]  # one of W&B


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return load_run(write_run(tmp_path / "results" / "skew=0.9").folder)


def log(run: Run) -> bool:
    return log_run(run, write_summary(run), [], group="g")


def test_run_holds_what_the_results_hold(run: Run) -> None:
    summary = write_summary(run)
    report = save_tables([run], skew_points([run]), run.folder.name, run.folder)
    assert log_run(run, summary, report.files, group="skew_sweep-0123abcd")
    logged = read_back(run.folder)

    described = logged.run
    assert (described.project, described.run_group, described.display_name, described.job_type) == (
        "tests", "skew_sweep-0123abcd", "skew=0.9", "skew_sweep",
    )  # fmt: skip
    assert logged.config["router"] == run.config["router"]
    assert logged.config["manifest"] == run.manifest

    final = logged.summary
    for system, entry in json.loads((run.folder / "summary.json").read_text())["systems"].items():
        for name, value in entry.items():
            for part, number in value.items() if isinstance(value, dict) else [(None, value)]:
                assert final[f"{system}/{name}" + (f"/{part}" if part else "")] == number
    assert final["best_baseline"] == "static_ep"

    rounds = {row["round"]: row for row in logged.history if "round" in row}
    values = per_iteration(run.layers, run.iterations)
    assert len(rounds) == 5
    assert len(values) == 25
    for row in values.to_dict("records"):
        for metric in METRICS:
            logged_value = rounds[row["round"]].get(f"{row['system']}/{metric.name}", math.nan)
            assert logged_value == pytest.approx(row[metric.name], nan_ok=True)
    measured = pd.read_parquet(run.folder / "iterations.parquet")
    for row in measured.to_dict("records"):
        assert rounds[row["round"]][f"{row['system']}/latency_s"] == row["latency_s"]

    iterations = logged.table("iterations")
    assert iterations["columns"] == list(measured.columns)
    assert iterations["data"] == measured.to_numpy().tolist()
    comparison = logged.table("comparison")
    throughput = comparison["columns"].index("throughput_tokens_per_s")
    by_system = measured.groupby("system", sort=False)["throughput_tokens_per_s"].median()
    assert [row[throughput] for row in comparison["data"]] == by_system.tolist()

    files = {path.relative_to(run.folder).as_posix(): path.read_bytes() for path in report.files}
    assert logged.files() == files
    assert set(files) >= {"table.txt", "table.csv", "figures/time_breakdown.png", "figures/time_breakdown.csv"}


def test_files_are_kept_as_they_were_beside_the_run(run: Run) -> None:
    path = run.folder / "table.csv"
    path.write_text("before")
    log_run(run, write_summary(run), [path], group="g")
    path.write_text("redrawn")
    logged = read_back(run.folder)
    assert logged.files() == {"table.csv": b"before"}
    (artifact,) = (record for record in logged.records["artifact"] if record.type == "results")
    assert Path(artifact.manifest.contents[0].local_path).is_relative_to(run.folder), "not in the home"
    assert "WANDB_DATA_DIR" not in os.environ


def test_sweep_has_a_run_of_its_own_beside_its_points(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "skew_sweep", [0.0, 0.9])
    sweep = load_sweep(folder)
    report = save_tables(sweep.runs, sweep.points, sweep.experiment, folder)
    assert log_sweep(sweep, report.frame, report.files)
    logged = read_back(folder)
    assert (logged.run.run_group, logged.run.job_type) == (sweep_group(folder), "sweep")
    assert sweep_group(folder) == "skew_sweep-0123abcd"
    assert logged.config["points"] == [{"router.skew": 0.0}, {"router.skew": 0.9}]
    assert logged.config["runs"] == ["skew=0.0", "skew=0.9"]
    files = logged.files()
    assert files["figures/skew_sweep.png"] == (folder / "figures" / "skew_sweep.png").read_bytes()
    assert files["table.csv"].decode() == report.frame.to_csv(index=False)
    comparison = logged.table("comparison")
    assert comparison["columns"] == list(report.frame.columns)
    assert len(comparison["data"]) == 2 * 5


def test_sweep_is_logged_again_only_if_its_table_is_another(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path / "skew_sweep", [0.0, 0.9])

    def report() -> int:
        sweep = load_sweep(folder)
        frame = summary_frame(sweep.runs, [summarise(run) for run in sweep.runs], sweep.points)
        assert log_sweep(sweep, frame, [])
        return len(list((folder / "wandb").glob("offline-run-*")))

    assert [report(), report()] == [1, 1]
    write_run(tmp_path / "skew_sweep" / "skew=0.9", seed=1)
    change_manifest(tmp_path / "skew_sweep" / "skew=0.9", run_id="skew=0.9")
    assert report() == 2


def test_a_run_is_logged_once(run: Run) -> None:
    assert not is_logged(run)
    assert log(run)
    assert is_logged(run)
    assert log(run)
    assert len(list((run.folder / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyError, wandb.errors.UsageError])
def test_whatever_fails_is_a_warning_and_tried_again_next_time(
    error: type[Exception], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> Any:
        raise error("broken\nin two lines")

    monkeypatch.setattr(wandb, "init", init)
    for _ in range(2):
        with pytest.warns(UserWarning, match=rf"^W&B: skew=0.9 was not logged \({error.__name__}: .*broken.*\)$"):
            assert not log(run)


def test_folder_that_cannot_be_written_is_a_warning(run: Run) -> None:
    (run.folder / "wandb").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match=r"^W&B: skew=0.9 was not logged \((File|NotADirectory)"):
        assert not log(run)
