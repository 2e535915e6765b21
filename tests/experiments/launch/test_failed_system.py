"""A system that fails its check leaves its point, loudly; all others are measured, reported and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.experiments.command import Command
from tests.programs import Programs

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(300)]

LOST = "bad failed its check and is left out: rank 0: 2 of 128 assignments were not executed"


def sweep(programs: Programs, folder: Path, systems: str, defects: str) -> Command:
    """Start a sweep over the defects of the system ``bad``."""
    return Command(
        folder, "run.py", "--multirun", "model=qwen3_tiny", "dataset=random", "batch_size=2", "seq_len=16", "rounds=2",
        "wandb.mode=disabled", "device=cpu", f"system={systems}", "decode_tokens=2", "requests.arrivals=poisson",
        "requests.rate_per_s=500", "requests.per_round=4", f"results_dir={folder}/results",
        "+systems.bad._target_=tests.experiments.measure.defects.Defective", f"+systems.bad.defect={defects}",
        programs=programs,
    )  # fmt: skip


def folders(results: Path) -> dict[str, Path]:
    """Return the points' folders by defect."""
    (found,) = results.glob("single/sweeps/*/sweep.json")
    content = json.loads(found.read_text())
    values = [value["+systems.bad.defect"] for value in content["values"]]
    return {value: results / "single" / run for value, run in zip(values, content["run_ids"], strict=True)}


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return content


def test_the_others_and_the_other_points_go_on(programs: Programs, tmp_path: Path) -> None:
    with sweep(programs, tmp_path, "[static_ep,harmoeny]", "'lost assignment',none") as command:
        assert command.wait(200) == 1, command.output()
        (error,) = command.errors()
        assert error.endswith(LOST)
        output = command.output()
    assert "report:" in output, "the sweep is reported all the same"
    points = folders(tmp_path / "results")
    failed, right = points["lost assignment"], points["none"]
    assert manifest(failed)["status"] == manifest(right)["status"] == "finished"
    assert manifest(failed)["failed_systems"] == {"bad": LOST.partition(": ")[2]}
    assert not manifest(failed)["checks"]["bad"]["passed"]
    assert manifest(right)["failed_systems"] == {}
    for folder, systems in ((failed, {"static_ep", "harmoeny"}), (right, {"static_ep", "harmoeny", "bad"})):
        assert set(manifest(folder)["systems"]) == systems
        assert set(json.loads((folder / "summary.json").read_text())["systems"]) == systems
        for table in ("layers", "iterations", "requests", "decode"):
            rows = pd.read_parquet(folder / f"{table}.parquet")
            assert set(rows["system"]) == systems, (folder, table)
            assert set(rows["round"]) == {0, 1}
    (report,) = tmp_path.glob("results/single/sweeps/*/report.html")
    assert "Failed checks" in report.read_text()
    (printed,) = tmp_path.glob("results/single/sweeps/*/table.txt")
    assert "failed its check at defect=lost assignment: rank 0: 2 of 128" in " ".join(printed.read_text().split())

    files = {path: path.stat().st_mtime_ns for path in failed.glob("*.parquet")}
    with sweep(programs, tmp_path, "[static_ep,harmoeny]", "'lost assignment',none") as command:
        assert command.wait(60) == 1, command.output()
        assert "2 points, 0 to run" in command.output()
        (error,) = command.errors()
        assert "bad failed its check: rank 0: 2 of 128 assignments were not executed" in error
    assert {path: path.stat().st_mtime_ns for path in failed.glob("*.parquet")} == files


def test_a_point_without_a_system_left_is_failed_and_the_next_one_runs(programs: Programs, tmp_path: Path) -> None:
    with sweep(programs, tmp_path, "[]", "'lost assignment',none") as command:
        assert command.wait(150) == 1, command.output()
        first, second = command.errors()
        assert first.endswith(LOST)
        assert second.endswith("no system passed its check; there is no result")
    points = folders(tmp_path / "results")
    failed, right = (manifest(points[defect]) for defect in ("lost assignment", "none"))
    assert (failed["status"], right["status"]) == ("failed", "finished")
    assert failed["error"] == "no system passed its check"
    assert list(failed["failed_systems"]) == ["bad"]
    assert not list(points["lost assignment"].glob("*.parquet"))
