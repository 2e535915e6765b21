"""Releases of other libraries that behave otherwise than is relied on: one line with the version, at the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import make_dataclass
from typing import Any

import pytest
import torch
import transformers
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from transformers.models.switch_transformers import modeling_switch_transformers as switch

from experiments.compose import swept
from experiments.launch import local
from harmoeny.dependencies import DependencyError
from harmoeny.models.switch import check_router_order

CHECKS: list[Any] = [check_router_order, local.check_torchelastic, swept.check_hydra]


@pytest.fixture(autouse=True)
def checked_anew() -> Iterator[None]:
    for check in CHECKS:
        check.cache_clear()
    yield
    for check in CHECKS:
        check.cache_clear()


@pytest.mark.parametrize("check", CHECKS)
def test_what_is_installed_will_do(check: Callable[[], None]) -> None:
    check()


def test_a_switch_router_with_another_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    now = switch.SwitchTransformersTop1Router.forward

    def of_5_17(self: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        choice, probability, logits = now(self, hidden)
        return probability, choice, logits

    monkeypatch.setattr(switch.SwitchTransformersTop1Router, "forward", of_5_17)
    with pytest.raises(
        DependencyError, match=f"^transformers {transformers.__version__}: its Switch router must return"
    ):
        check_router_order()


def test_other_logs_of_torchelastic_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LogsDest", make_dataclass("LogsDest", ["stdouts"]))
    with pytest.raises(DependencyError, match=r"^torch 2\..*: DefaultLogsSpecs.reify must"):
        local.check_torchelastic()
    monkeypatch.undo()
    local.check_torchelastic.cache_clear()
    monkeypatch.setattr(DefaultLogsSpecs, "reify", len)
    with pytest.raises(DependencyError):
        local.check_torchelastic()


def test_another_sweeper_of_hydra_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BasicSweeper, "split_arguments", len)
    with pytest.raises(DependencyError, match=r"^hydra-core 1\..*: BasicSweeper.split_arguments must"):
        swept.check_hydra()
