"""Launch and rate of an expert from two slices, whose times are made up here."""

from __future__ import annotations

import pytest
import torch

from harmoeny.hardware import Hardware
from harmoeny.runtime.calibrate import fit_expert, measure_expert_cost, with_host_cost
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.host import make_host
from harmoeny.runtime.memory.links import make_transfers
from tests.harmoeny.runtime.cases import random_experts


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
