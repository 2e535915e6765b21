"""What a sweep's points are checked against when SLURM will run them: the job that it asks for, not this host."""

from __future__ import annotations

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException

from experiments.compose.load import Components
from experiments.compose.messages import explain
from experiments.compose.submitted import is_submitted, load_swept_point
from tests.conftest import Compose

SLURM = "hydra/launcher=slurm"


def test_the_job_decides_about_the_device(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [
        compose(*overrides, multirun=True)
        for overrides in ((SLURM,), (SLURM, "hydra.launcher.gpus_per_node=2"), (SLURM, "device=cuda"), ())
    ]
    assert [is_submitted(config) for config in configs] == [True, True, True, False]
    ids = []
    for cuda_here in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=cuda_here: here)
        points = [load_swept_point(config.copy(), Components()) for config in configs[:3]]
        assert [point.device_type for point in points] == ["cpu", "cuda", "cuda"], "whatever the login node has"
        ids.append([point.run_id for point in points])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2, "a run's name depends on its device"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=2"], r"world_size: 2, must be 4, the ranks that"),
        (["hydra.launcher.gpus_per_node=1"], r"hydra\.launcher\.gpus_per_node: 1, must be at least 2"),
        (["world_size=0"], r"world_size: 0, must be at least 1"),
    ],
)
def test_a_job_without_room_is_refused_before_it_waits(compose: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_swept_point(compose(SLURM, *overrides, multirun=True), Components())


def test_ranks_do_not_submit(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match=r"hydra/launcher: 'slurm', must be basic where torchrun or SLURM"):
        load_swept_point(compose(SLURM, multirun=True), Components())


def test_what_is_missing_is_named(compose: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    compose()  # Hydra has looked for its plugins now
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "submitit_slurm.yaml")
    with pytest.raises(MissingConfigException) as error:
        compose(SLURM)
    assert explain(error.value) == (
        "hydra/launcher: 'slurm' is unavailable here without hydra-submitit-launcher: pip install '.[slurm]'"
    )
