"""One way to start the runtime on a rank: it costs what was given, calibrated or measured, and closing undoes it."""

from __future__ import annotations

import threading

import pytest

from baselines.static_ep import StaticEP
from harmoeny.cost import ExpertCost
from harmoeny.hardware import Hardware
from harmoeny.runtime.device import CpuDevice, Device, choose_device, span_s
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.transfer import ThreadTransfers
from harmoeny.runtime.start import start_rank
from tests.harmoeny.runtime.cases import COST, CPU, random_experts, random_tokens

LAYERS = [random_experts(2, 0), random_experts(2, 1)]
CALIBRATED = Hardware(expert_flops_per_s=1e9, host_link_bytes_per_s=1e8, all_to_all_bytes_per_s=1e7)


def test_the_cost_that_was_given_goes_before_a_calibration_and_that_before_a_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = ExpertCost(token_s=3.0, fetch_s=4.0)
    monkeypatch.setattr("harmoeny.runtime.start.measure_expert_cost", lambda *_: measured)
    comm = Communicator(CPU)
    flops, num_bytes = LAYERS[0].flops_per_token, LAYERS[0].expert_bytes
    for hardware, cost, wanted in (
        (CALIBRATED, COST, COST),
        (CALIBRATED, None, CALIBRATED.expert_cost(expert_bytes=num_bytes, flops_per_token=flops, token_bytes=8 * 4)),
        (Hardware(host_link="emulated", host_link_bytes_per_s=1e8), None, measured),
        (None, None, measured),
    ):
        engine = start_rank(LAYERS, comm, hardware, cost=cost)
        assert engine.memory.cost == wanted
        engine.close()


def test_closing_waits_for_copies_and_ends_the_copy_thread_unless_it_is_shared() -> None:
    def copying() -> int:
        return sum(thread.name == "expert-copies" for thread in threading.enumerate())

    before, tokens = copying(), random_tokens(0, 4, 2, 1)
    engine = start_rank(LAYERS, Communicator(CPU), cost=COST, record=False)
    engine.use(engine.build_system("x", StaticEP()))
    engine.forward(0, tokens.hidden, tokens.ids, tokens.weights)
    assert copying() == before + 1
    engine.close()
    assert copying() == before
    shared = ThreadTransfers(Hardware())
    for _ in range(2):
        start_rank(LAYERS, Communicator(CPU), cost=COST, transfers=shared).close()
    assert copying() == before + 1
    shared.close()


def test_a_rank_that_cannot_start_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> ExpertCost:
        raise RuntimeError("no calibration today")

    monkeypatch.setattr("harmoeny.runtime.start.measure_expert_cost", fail)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no calibration today"):
        start_rank(LAYERS, Communicator(CPU))
    assert threading.active_count() == before


def test_the_processor_as_a_device() -> None:
    device = Device.of(choose_device("cpu", 3))
    assert isinstance(device, CpuDevice)
    assert Device.of(CPU) is device
    assert (device.process_group, device.has_own_memory) == ("gloo", False)
    begin = device.now()
    device.synchronize()
    device.synchronize_compute()
    assert 0 <= span_s((begin, device.now())) < 1
