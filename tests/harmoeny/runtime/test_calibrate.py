"""Launch and rate of an expert from two slices, whose times are made up here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from harmoeny.cores import Cores
from harmoeny.hardware import Hardware
from harmoeny.runtime import calibrate
from harmoeny.runtime.calibrate import copy_share, fit_expert, idle_speedup, measure_expert_cost, with_host_cost
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.host import make_host
from harmoeny.runtime.memory.links import make_transfers
from harmoeny.runtime.memory.slots import LayerSlots, Transfer
from harmoeny.runtime.memory.transfer import CopyRequest, ThreadTransfers
from tests.harmoeny.runtime.cases import random_experts
from tests.harmoeny.runtime.thread_ranks import run_threads


@pytest.mark.parametrize(
    ("launch_s", "token_s"),
    [(0.0, 1e-5), (1e-4, 1e-5), (5e-5, 1e-8)],  # a CPU, a CPU with large weights, a GPU
)
def test_launch_and_rate_are_told_apart(launch_s: float, token_s: float) -> None:
    assert fit_expert(lambda n: launch_s + n * token_s) == pytest.approx((launch_s, token_s), abs=1e-12)


def test_a_gpu_is_given_enough_tokens() -> None:
    # Up to 2048 tokens cost nothing: the weights have to be read once, and that takes longer.
    launch_s, token_s = fit_expert(lambda n: max(1e-4, n * 5e-8))
    assert token_s == pytest.approx(5e-8, rel=0.3)
    assert launch_s > 0


def test_times_that_are_noise_are_no_reason_to_divide_by_nothing() -> None:
    assert fit_expert(lambda n: 1e-6 if n < 1000 else 5e-7) == (0.0, 5e-7 / 32768)


def test_it_leaves_the_callers_random_numbers_as_they_are() -> None:
    cpu = torch.device("cpu")
    transfers, host = make_transfers(cpu, Hardware()), make_host(cpu, Hardware(), 1)
    experts, comm = random_experts(2, 0), Communicator(cpu)
    before = torch.random.get_rng_state()
    with_host_cost(measure_expert_cost(experts, comm, transfers), experts, comm, transfers, host)
    transfers.close()
    host.close()
    assert torch.equal(torch.random.get_rng_state(), before)


#: What a slice and a copy take where they are made up: longer than a thread needs to wake up.
_SLICE_S, _COPY_S = 10e-3, 10e-3


class CopiesOfTheProcessor(ThreadTransfers):
    """Copies that take no time by themselves; what they take from the next slice is noted."""

    def __init__(self) -> None:
        super().__init__(Hardware())
        self.owed = 0

    def submit(self, request: CopyRequest) -> Transfer:
        self.owed += 1
        return super().submit(request)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_how_much_copies_take_from_computation_is_measured(share: float) -> None:
    transfers, comm = CopiesOfTheProcessor(), Communicator(torch.device("cpu"))

    def compute(weights: Mapping[str, Tensor], rows: Tensor, out: Tensor) -> None:
        time.sleep(_SLICE_S + share * transfers.owed * _COPY_S)
        transfers.owed = 0

    experts = replace(random_experts(4, 0), function=compute)
    slots = LayerSlots(experts, comm.device).reserve(3)
    found = copy_share(experts, slots, transfers, comm, 1, _COPY_S)
    transfers.close()
    assert found == pytest.approx(share, abs=0.2)


@pytest.mark.parametrize(("num_cores", "num_threads", "speedup"), [(3, 1, 1.0), (2, 1, 1.5), (4, 4, 3.0), (2, 4, 3.0)])
def test_ranks_that_share_cores_are_faster_while_others_are_idle(
    num_cores: int, num_threads: int, speedup: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With three ranks, and so many threads each; more threads than cores are no faster."""
    monkeypatch.setattr(calibrate, "usable_cores", lambda: Cores(num_cores, None, None))
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    assert run_threads(3, idle_speedup) == [speedup] * 3


def test_a_launch_takes_no_longer_than_a_slice_of_one_token() -> None:
    launch_s, _ = fit_expert(lambda n: {1: 2e-3, 128: 30e-3}.get(n, n * 1e-4))
    assert launch_s == 2e-3
