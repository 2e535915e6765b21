"""The dense references of a check: as few as there are routings, and compared indeed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from experiments.measure import check
from experiments.measure.batch import dense_forward
from experiments.measure.bench import Bench
from experiments.measure.check import check_systems
from harmoeny.models.base import MoEModel
from tests.conftest import Load
from tests.experiments.runs import set_up

SYSTEMS = ["harmoeny", "static_ep", "drop", "eplb"]


@pytest.fixture
def bench(load: Load, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Top-2 routing of which one rank's experts can hold about half."""
    monkeypatch.setenv("RANK", "0")
    point = load(
        "model=moe_stack", "model.top_k=2", "model.hidden_size=16", "model.intermediate_size=16", "dataset=random",
        "world_size=1", "batch_size=2", "seq_len=16", "rounds=1", "router.num_hot=2", "router.skew=0.9",
        f"system=[{','.join(SYSTEMS)}]", "systems.drop.capacity_factor=0.8",
    )  # fmt: skip
    with torch.inference_mode():
        return set_up(point)


def test_exact_systems_share_one_reference_and_a_dropping_one_has_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[bool] = []

    def counted(
        model: MoEModel, input_ids: Tensor, expert_ids: Sequence[Tensor], kept: Sequence[Tensor] | None = None
    ) -> Tensor:
        dropped.append(kept is not None)
        return dense_forward(model, input_ids, expert_ids, kept)

    monkeypatch.setattr(check, "dense_forward", counted)
    with torch.inference_mode():
        checks = check_systems(bench)
    assert sorted(dropped) == [False, True]
    assert list(checks) == SYSTEMS
    assert all(outcome["passed"] for outcome in checks.values())
    assert max(outcome["relative_error"] for outcome in checks.values()) <= 1e-5
    assert {name for name, outcome in checks.items() if outcome["kept_share"] < 1} == {"drop"}


def test_another_output_has_no_numbers(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def another(*arguments: object) -> Tensor:
        return dense_forward(*arguments) * 1.001  # type: ignore[arg-type]

    monkeypatch.setattr(check, "dense_forward", another)
    with torch.inference_mode():
        checks = check_systems(bench)
    assert not any(outcome["passed"] for outcome in checks.values())
    assert checks["harmoeny"]["reason"].startswith("rank 0: the output differs from the dense model's by ")
