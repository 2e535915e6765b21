"""Whole layers over the Triton kernels, interpreted: between ranks that are threads of a machine without a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from harmoeny.hardware import Hardware
from harmoeny.runtime import calibrate_device
from harmoeny.runtime.exchange import fused
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.kernels import make_kernel
from harmoeny.runtime.kernels.grouped import GroupedKernel
from harmoeny.runtime.memory.links import make_transfers
from harmoeny.runtime.memory.slots import LayerSlots
from tests.harmoeny.runtime.cases import TOLERANCE, RandomPlan, random_experts, random_tokens
from tests.harmoeny.runtime.exchange.test_fused import NO_TRITON
from tests.harmoeny.runtime.layer.test_engine import run_layers

pytestmark = [
    NO_TRITON,
    pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels, which is for machines without a GPU"),
]


@pytest.fixture
def fused_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpret the kernels between ranks that are threads: one at a time, as the interpreter has one state."""
    turn = threading.RLock()

    def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with turn:
                return function(*args, **options)

        return call

    for name in ("number_assignments", "spread_tokens", "put_tokens", "put_rows", "put_copies", "add_up"):
        monkeypatch.setattr(fused, name, one_at_a_time(getattr(fused, name)))
    monkeypatch.setattr(fused, "is_available", lambda _: True)


@pytest.mark.usefixtures("fused_everywhere")
@pytest.mark.parametrize(
    ("world_size", "drop", "num_slots"), [(1, False, None), (3, False, None), (2, True, 1), (3, True, 2), (4, False, 1)]
)
@pytest.mark.parametrize(("dtype", "exchange"), [*product(TOLERANCE, ["put"]), (torch.float32, "collective")])
def test_layers_are_exact_over_triton(
    world_size: int, drop: bool, num_slots: int | None, dtype: torch.dtype, exchange: str
) -> None:
    tokens = [
        [random_tokens(10 * layer + rank, 9 * rank + 4, 6, 2, dtype=dtype, masked=0.1) for rank in range(world_size)]
        for layer in range(2)
    ]
    policy = RandomPlan(world_size, drop=drop, num_slots=num_slots)
    run_layers(
        world_size,
        policy,
        tokens,
        num_experts=6,
        batches=2,
        kernel="grouped_mm",
        exchange=exchange,
        width=16,
        dtype=dtype,
    )


@pytest.mark.usefixtures("fused_everywhere")
def test_what_beginning_early_takes_is_measured_over_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_device, "EARLY_ROWS", 64)
    device, transfers = torch.device("cpu"), make_transfers(torch.device("cpu"), Hardware())
    slots = LayerSlots(random_experts(40, 0, hidden_size=64, width=32), device)
    slots.reserve(16)
    kernel = make_kernel("grouped_mm", slots, filled=transfers.fills_slots)
    assert isinstance(kernel, GroupedKernel)
    with torch.inference_mode():
        calibrate_device.measure_wave(kernel, transfers)  # fills the slots
        assert calibrate_device.measure_early(kernel, Communicator(device)) > 0
    transfers.close()
