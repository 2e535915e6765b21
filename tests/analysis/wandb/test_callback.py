"""What Hydra's callback records and uploads in every mode of ``wandb.mode``."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig

from analysis.report_callback import Report
from tests.analysis.wandb.records import read_back
from tests.synthetic import change_manifest, write_run, write_sweep

pytestmark = [pytest.mark.programs, pytest.mark.usefixtures("no_account", "few")]  # one of W&B


def job(folder: Path, mode: RunMode) -> JobReturn:
    done = JobReturn(hydra_cfg=DictConfig({"hydra": {"mode": mode}}))
    done.status, done.return_value = JobStatus.COMPLETED, str(folder)
    return done


def config(mode: str) -> DictConfig:
    return DictConfig({"experiment": "skew_sweep", "wandb": {"mode": mode}})


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were uploaded."""
    folders: list[Path] = []

    def upload(given: Sequence[Path]) -> None:
        folders.extend(given)

    monkeypatch.setattr("analysis.report.finish.upload", upload)
    return folders


@pytest.fixture
def sweep_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_sweep(tmp_path / "skew_sweep", [0.0, 0.9])
    monkeypatch.setenv("HARMOENY_SWEEP_DIR", str(folder))
    monkeypatch.delenv("RANK", raising=False)
    return folder


def run_sweep(folder: Path, mode: str) -> list[Path]:
    report, points = Report(), sorted(folder.parent.parent.glob("skew=*"))
    for point in points:
        report.on_job_end(config(mode), job(point, RunMode.MULTIRUN))
    report.on_multirun_end(config(mode))
    return points


def test_sweep_is_one_group_of_its_points_and_itself(sweep_dir: Path, uploaded: list[Path]) -> None:
    points = run_sweep(sweep_dir, "offline")
    logged = [read_back(folder) for folder in (*points, sweep_dir)]
    assert [entry.run.run_group for entry in logged] == ["skew_sweep-0123abcd"] * 3
    assert [entry.run.job_type for entry in logged] == ["skew_sweep", "skew_sweep", "sweep"]
    for entry, folder in zip(logged, (*points, sweep_dir), strict=True):
        files = entry.files()
        assert files["table.csv"] == (folder / "table.csv").read_bytes()
        assert {Path(name).suffix for name in files} == {".txt", ".csv", ".png", ".pdf"}
    assert uploaded == []

    files_before = sorted(sweep_dir.parent.parent.rglob("*"))
    times = {path: path.stat().st_mtime_ns for point in points for path in point.rglob("*")}
    run_sweep(sweep_dir, "offline")
    assert sorted(sweep_dir.parent.parent.rglob("*")) == files_before, "the same is not logged twice"
    assert {path: path.stat().st_mtime_ns for path in times} == times, "nor drawn"


def test_online_uploads_points_and_sweep_at_the_end(sweep_dir: Path, uploaded: list[Path]) -> None:
    points = run_sweep(sweep_dir, "online")
    assert set(uploaded) == {*points, sweep_dir}
    assert all(list(folder.glob("wandb/offline-run-*")) for folder in uploaded)


def test_unfinished_sweep_is_not_logged_but_its_points_are_uploaded(sweep_dir: Path, uploaded: list[Path]) -> None:
    point = sweep_dir.parent.parent / "skew=0.9"
    change_manifest(point, status="running")
    Report().on_multirun_end(config("online"))
    assert not (sweep_dir / "wandb").exists()
    assert point not in uploaded


def test_single_run_is_uploaded_at_its_end(
    tmp_path: Path, uploaded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HARMOENY_SWEEP_DIR", raising=False)
    folder = write_run(tmp_path / "run").folder
    Report().on_job_end(config("online"), job(folder, RunMode.RUN))
    assert uploaded == [folder]
    assert read_back(folder).run.run_group == "skew_sweep"


def test_disabled_leaves_no_trace(sweep_dir: Path, uploaded: list[Path]) -> None:
    run_sweep(sweep_dir, "disabled")
    assert not list(sweep_dir.parent.parent.rglob("wandb"))
    assert uploaded == []
