import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from analysis.data.load import load_sweep
from analysis.report.__main__ import main
from analysis.report.reports import report_sweep
from analysis.report_callback import Report
from tests.synthetic import change_manifest, write_run, write_sweep

CONFIG = OmegaConf.create({"experiment": "skew_sweep", "wandb": {"mode": "disabled"}})


def test_sweep_is_printed_and_saved_and_what_is_missing_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sweep(tmp_path, [0.0, 0.5, 0.9])
    change_manifest(tmp_path / "skew=0.5", status="running")
    report_sweep(load_sweep(folder))
    output = capsys.readouterr().out
    assert "missing: skew=0.5 (start the same command again)" in output
    assert (folder / "table.txt").read_text() in output
    assert f"figure: {folder / 'figures' / 'skew_sweep.png'}" in output
    assert f"report: {folder / 'report.html'}" in output
    assert "skew=0.5 (running)" in (folder / "report.html").read_text(encoding="utf-8")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "sweep.json",
        "table.txt",
        "table.csv",
        "report.html",
        *(f"figures/{name}.{s}" for name in ("skew_sweep", "policy_sweep") for s in ("png", "pdf", "csv")),
    }


def test_sweep_of_which_nothing_is_finished_is_only_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path, [0.0, 0.5])
    for name in ("skew=0.0", "skew=0.5"):
        change_manifest(tmp_path / name, status="failed")
    report_sweep(load_sweep(folder))
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["missing:", "skew=0.0"],
        ["missing:", "skew=0.5"],
    ]
    assert [path.name for path in folder.iterdir()] == ["sweep.json"]


def test_command_writes_the_page_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_sweep(tmp_path / "results", [0.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["report", str(folder), "--out", str(tmp_path / "page.html")])
        main()
        assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
        assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
        patch.setattr("sys.argv", ["report", str(tmp_path / "nothing")])
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("nothing: must be a folder of results")


@pytest.mark.programs
def test_every_start_of_run_py_imports_the_callback_and_none_of_what_it_reports_with() -> None:
    heavy = ("matplotlib", "numpy", "pandas", "plotly", "scipy", "wandb")
    code = f"import sys, analysis.report_callback; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


class TestCallback:
    """What Hydra calls after a job, after a single run and after a sweep."""

    def job(self, folder: Path | None, mode: RunMode = RunMode.RUN, status: JobStatus = JobStatus.COMPLETED) -> Any:
        job = JobReturn(hydra_cfg=DictConfig({"hydra": {"mode": mode}}))
        job.status = status
        job.return_value = None if folder is None else str(folder)
        return job

    @pytest.fixture(autouse=True)
    def no_sweep(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HARMOENY_SWEEP_DIR", raising=False)

    def test_single_run_is_summarised_and_reported(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = write_run(tmp_path / "run").folder
        report = Report()
        report.on_job_end(CONFIG, self.job(folder))
        report.on_run_end(CONFIG)
        assert (folder / "summary.json").exists()
        assert (folder / "table.txt").read_text() in capsys.readouterr().out
        assert "Static EP" in (folder / "report.html").read_text(encoding="utf-8")

    def test_run_of_a_sweep_is_summarised_and_reported_at_the_end(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sweep_dir = write_sweep(tmp_path, [0.0, 0.9])
        monkeypatch.setenv("HARMOENY_SWEEP_DIR", str(sweep_dir))
        report = Report()
        report.on_job_end(CONFIG, self.job(tmp_path / "skew=0.0", RunMode.MULTIRUN))
        assert capsys.readouterr().out == ""
        assert (tmp_path / "skew=0.0" / "summary.json").exists()
        report.on_multirun_end(CONFIG)
        assert (sweep_dir / "table.txt").read_text() in capsys.readouterr().out

    def test_failed_job_and_other_ranks_are_passed_over(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run").folder
        report = Report()
        report.on_job_end(CONFIG, self.job(folder, status=JobStatus.FAILED))
        report.on_job_end(CONFIG, self.job(None))
        report.on_run_end(CONFIG)
        assert not (folder / "summary.json").exists()

    def test_damaged_result_is_one_line_and_the_process_fails_at_the_end(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = write_run(tmp_path / "run").folder
        (folder / "layers.parquet").unlink()
        report = Report()
        report.on_job_end(CONFIG, self.job(folder))  # a sweep goes on
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {folder}: cannot be read (")
        with pytest.raises(SystemExit) as caught:
            report.on_run_end(CONFIG)
        assert caught.value.code == 1

    def test_defect_is_shown_and_not_made_a_warning(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("analysis.report.finish.write_summary", lambda _: SimpleNamespace().nothing)
        report = Report()
        report.on_job_end(CONFIG, self.job(write_run(tmp_path / "run").folder))
        assert "AttributeError" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            report.on_multirun_end(CONFIG)
