"""A sweep as SLURM's array: a task per group of points, which runs them together. SLURM itself: tests/cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")

from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

from experiments.compose import slurm
from experiments.compose.groups import left_of_group, note_measured
from experiments.compose.load import load_point
from experiments.compose.slurm import SlurmSweep
from experiments.point.point import Point
from experiments.results.run_folder import RunFolder
from results_schema.files import SWEEP_DIR_VARIABLE
from tests.conftest import Compose

SMALL = (
    "experiment=smoke", "hydra/launcher=slurm", "wandb.mode=disabled", "system=[static_ep]", "device=cpu",
    "model.hidden_size=16",
)  # fmt: skip
SWEPT = [[f"router.skew={skew}", f"batch_size={size}"] for skew in (0, 0.5, 0.9) for size in (1, 2)]


class Executor:
    """Takes tasks as submitit's executor does, and runs none."""

    tasks: list[tuple[Any, ...]]

    def __init__(self, **_: Any) -> None:
        pass

    def update_parameters(self, **_: Any) -> None:
        pass

    def map_array(self, _: object, *arguments: Sequence[Any]) -> list[Any]:
        type(self).tasks = list(zip(*arguments, strict=True))
        paths = SimpleNamespace(stdout=Path("out"), folder=Path("logs"))
        return [SimpleNamespace(job_id=f"7_{index}", paths=paths) for index in range(len(self.tasks))]


@pytest.fixture
def sweep(compose: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmSweep:
    config = compose(*SMALL, f"results_dir={tmp_path / 'results'}", multirun=True)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    monkeypatch.setenv(SWEEP_DIR_VARIABLE, str(tmp_path))
    (tmp_path / "sweep.json").write_text('{"run_ids": []}')
    monkeypatch.setattr("submitit.AutoExecutor", Executor)
    monkeypatch.setattr(slurm, "_queue", set)
    monkeypatch.setattr(slurm, "_wait", lambda _: None)
    made = SlurmSweep(submitit_folder="x", slurm_max_num_timeout=0, max_num_timeout=0)
    made.params = {"submitit_folder": "x", "max_num_timeout": 0}
    made.setup(hydra_context=SimpleNamespace(config_loader=hydra.config_loader), task_function=None, config=config)
    return made


def points_of(sweep: SlurmSweep) -> list[Point]:
    return [load_point(sweep._compose(overrides)) for overrides in SWEPT]


def test_points_that_differ_in_routing_alone_are_one_task(
    sweep: SlurmSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.launch(SWEPT, 0)
    assert len(Executor.tasks) == 2, "two batch sizes"
    for size, (overrides, _, nums, _, _) in zip((1, 2), Executor.tasks, strict=True):
        assert [own[:2] for own in overrides] == [
            [f"router.skew={skew}", f"batch_size={size}"] for skew in (0, 0.5, 0.9)
        ]
        assert list(nums) == [size - 1, size + 1, size + 3]
    jobs = [RunFolder(point.folder).submission["job"] for point in points_of(sweep)]
    assert jobs == ["7_0", "7_1"] * 3
    assert "SLURM job 7: 6 points in 2 tasks submitted; output in ." in capsys.readouterr().err


def test_a_task_runs_the_points_of_its_group_and_knows_them(sweep: SlurmSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.launch(SWEPT, 0)
    points, ran = points_of(sweep), list[Any]()

    def run(self: object, overrides: list[str], dir_key: str, num: int, job_id: str, state: object) -> str:
        point = load_point(sweep._compose(overrides))
        ran.append((num, [other.run_id for other in left_of_group(point)]))
        note_measured(left_of_group(point))
        return job_id

    monkeypatch.setattr(SlurmLauncher, "__call__", run)
    monkeypatch.setattr(slurm, "setup_globals", lambda: None)
    overrides, dir_key, nums, ids, _ = Executor.tasks[0]
    assert sweep(overrides, dir_key, nums, ids, Singleton.get_state()) == list(ids)
    assert ran == [(0, [point.run_id for point in points[::2]]), (2, []), (4, [])], "the first takes the others with it"


def test_only_what_is_missing_of_a_group_is_submitted(sweep: SlurmSweep, monkeypatch: pytest.MonkeyPatch) -> None:
    done = points_of(sweep)[2]
    monkeypatch.setattr(slurm, "_is_complete", lambda point: point.run_id == done.run_id)
    sweep.launch(SWEPT, 0)
    assert [list(nums) for _, _, nums, _, _ in Executor.tasks] == [[0, 4], [1, 3, 5]]


def test_every_point_of_a_task_is_told_how_it_ended(
    sweep: SlurmSweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.launch(SWEPT, 0)
    monkeypatch.undo()
    monkeypatch.setattr(slurm, "_queue", set)
    monkeypatch.setattr(slurm, "_POLL_S", (0.0, 0.0))
    monkeypatch.setattr(slurm, "_FILES_LATE_S", 0)
    with pytest.raises(SystemExit):
        slurm._wait(points_of(sweep))
    assert capsys.readouterr().err.count("ended without a result") == len(SWEPT)
