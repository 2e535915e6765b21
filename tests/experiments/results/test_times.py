from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.compose.dry_run import describe_runs
from experiments.point.point import Point
from experiments.results.times import duration, read_times, sweep_left
from tests.conftest import Load

SIMULATED = ("backend=simulator", "hardware=dgx_h100", "system=[harmoeny,static_ep]", "warmup_rounds=1", "rounds=8")


def write(point: Point, seconds: int, status: str = "finished", **manifest: Any) -> None:
    """Leave what a run of so many seconds leaves."""
    point.folder.mkdir(parents=True)
    (point.folder / "config.yaml").write_text(yaml.safe_dump(point.config))
    times = {
        "started_at": "2026-01-01T10:00:00+00:00",
        "ended_at": f"2026-01-01T10:{seconds // 60:02}:{seconds % 60:02}+00:00",
    }
    (point.folder / "manifest.json").write_text(json.dumps({"status": status, **times, **manifest}))


def test_a_time_is_that_of_finished_runs_of_the_same_load(load: Load) -> None:
    for tag, seconds, status in (
        ("a", 20, "finished"),
        ("b", 40, "finished"),
        ("c", 60, "finished"),
        ("d", 1, "failed"),
    ):
        write(load(*SIMULATED, f"tag={tag}"), seconds, status)  # 20 passes of systems each
    times = read_times(Path(load(*SIMULATED).options.results_dir))
    assert times.estimate_s(load(*SIMULATED, "router.skew=0.5")) == pytest.approx(40)
    assert times.estimate_s(load(*SIMULATED, "rounds=18")) == pytest.approx(80)
    assert times.estimate_s(load(*SIMULATED, "system=[static_ep]")) == pytest.approx(20)
    for other in ("batch_size=9", "seq_len=9", "world_size=3", "model=switch_tiny", "hardware=dgx_a100"):
        assert times.estimate_s(load(*SIMULATED, other)) is None
    assert times.estimate_s(load(*SIMULATED, "backend=ranks")) is None


def test_a_run_that_was_measured_with_others_took_its_share(load: Load) -> None:
    write(load(*SIMULATED), 60, group={"id": "one", "run_ids": ["a", "b", "c"]})
    times = read_times(Path(load(*SIMULATED).options.results_dir))
    assert times.estimate_s(load(*SIMULATED, "router.skew=0.5")) == pytest.approx(20)


def test_rounds_that_until_added_count(load: Load) -> None:
    write(load(*SIMULATED), 80, until={"rounds": 18})
    times = read_times(Path(load(*SIMULATED).options.results_dir))
    assert times.estimate_s(load(*SIMULATED, "router.skew=0.5")) == pytest.approx(40)


def test_damaged_runs_tell_nothing(load: Load) -> None:
    for tag, file in (("a", "manifest.json"), ("b", "config.yaml")):
        point = load(*SIMULATED, f"tag={tag}")
        write(point, 20)
        (point.folder / file).write_text("{")
    assert not read_times(Path(point.options.results_dir)).pass_s


def test_a_dry_run_says_what_is_kept_and_the_total_time(load: Load) -> None:
    points = [load(*SIMULATED, f"router.skew={skew}") for skew in (0, 0.5, 0.9)]
    values = [{"router.skew": skew} for skew in (0, 0.5, 0.9)]
    assert describe_runs(points, values)[-1].startswith(
        "single: 3 points, 3 to run, time unknown (no run of such a model and load has finished in "
    )
    write(points[0], 30)
    kept, first, second, total = describe_runs(points, values)
    assert kept == f"kept    router.skew=0: 2 systems x 8 rounds ({points[0].folder})"
    assert (first, second) == tuple(
        f"to run  router.skew={skew}: 2 systems x 8 rounds, about 30 s" for skew in (0.5, 0.9)
    )
    assert total == "single: 3 points, 2 to run, about 60 s"
    larger = load(*SIMULATED, "batch_size=99")
    assert "1 to run" not in describe_runs([*points, larger], [*values, {"router.skew": 1}])[-1]
    assert "about 60 s for 2 of them, the others: time unknown" in describe_runs([*points, larger], [*values, {}])[-1]


def test_what_is_left_of_a_sweep(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [load(*SIMULATED, f"router.skew={skew}") for skew in (0, 0.3, 0.5, 0.9)]
    folder = points[0].folder.parent / "sweeps" / "12345678"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"run_ids": [point.run_id for point in points]}))
    assert sweep_left() == "", "no sweep"
    monkeypatch.setenv("HARMOENY_SWEEP_DIR", str(folder))
    assert sweep_left() == "", "nothing is known"
    write(points[0], 100)
    assert sweep_left() == "1 of 4 points done, about 5 min left"
    write(points[2], 20)
    assert sweep_left() == "2 of 4 points done, about 2 min left"
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_ARRAY_TASK_ID", "1")
        assert sweep_left() == "", "tasks run side by side"
    for point in (points[1], points[3]):
        write(point, 1)
    assert sweep_left() == "", "nothing is left"


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (80, "80 s"), (200, "3 min"), (9000, "2.5 h")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
