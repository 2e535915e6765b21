"""What waves and links cost, from times that are made up here; and that it can be measured, with ranks that send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harmoeny.choices import Exchange, KernelName
from harmoeny.cost import ExpertCost
from harmoeny.hardware import Hardware
from harmoeny.runtime.calibrate import fetch_together_s
from harmoeny.runtime.calibrate_device import fit_link, fit_wave, measure_device_cost
from harmoeny.runtime.exchange.choose import open_exchange
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.links import make_transfers
from harmoeny.runtime.memory.slots import LayerSlots, Slot, Transfer
from harmoeny.runtime.memory.transfer import CopyRequest, Transfers
from tests.harmoeny.runtime.cases import random_experts
from tests.ranks import run_ranks
from tests.strategies import examples

CPU = torch.device("cpu")


@examples(100)
@given(
    launch_s=st.floats(1e-6, 1e-4), token_s=st.floats(1e-9, 1e-6), weights_s=st.floats(1e-7, 1e-5),
    num_slices=st.sampled_from([2, 8, 16]),
)  # fmt: skip
def test_a_waves_launch_its_weights_and_its_rows_are_told_apart(
    launch_s: float, token_s: float, weights_s: float, num_slices: int
) -> None:
    def wave_s(slices: int, tokens: int) -> float:
        return launch_s + max(slices * tokens * token_s, slices * weights_s)

    found = fit_wave(wave_s, num_slices)
    assert found.launch_s + max(1 * token_s, found.weights_s) == pytest.approx(wave_s(1, 1), rel=1e-6)
    assert found.weights_s == pytest.approx(max(weights_s, token_s), rel=1e-6)
    if wave_s(num_slices, 32768 // num_slices) > 2 * wave_s(num_slices, 1):  # so many rows that their time is seen
        assert found.token_s == pytest.approx(token_s, rel=1e-6)


def test_one_expert_has_its_weights_in_the_launch() -> None:
    found = fit_wave(lambda slices, tokens: 1e-5 + max(1e-4, slices * tokens * 1e-7), 1)
    assert found == pytest.approx((1.1e-4, 1e-7, 0.0))


def test_noise_is_no_negative_cost() -> None:
    found = fit_wave(lambda slices, tokens: 1e-3 - slices * 1e-6 - tokens * 1e-9, 4)
    assert min(found) >= 0
    assert found.token_s > 0
    link = fit_link([2e-3, 1e-3], [1e-3, 2e-3], 100, 1000)
    assert min(link) >= 0
    assert link.token_s > 0


def test_a_links_start_its_rows_and_their_copies_are_told_apart() -> None:
    latency_s, copy_s, row_s = 5e-5, 1e-8, 4e-8
    apart, at_home = ([latency_s + n * (2 * copy_s + s) for n in (100, 3000)] for s in (row_s, 0.0))
    assert fit_link(apart, at_home, 100, 3000) == pytest.approx((latency_s, row_s, copy_s))


def test_ranks_that_share_memory_send_almost_for_nothing() -> None:
    times = [1e-5 + n * 2e-8 for n in (100, 3000)]
    link = fit_link(times, times, 100, 3000)
    assert link.token_s == pytest.approx(0.01 * 2e-8)
    assert link.copy_s == pytest.approx(1e-8)


def measured_on(rank: int, exchange: str) -> ExpertCost:
    del rank
    comm = open_exchange(Communicator(CPU, timeout_s=60), exchange)
    transfers = make_transfers(CPU, Hardware())
    with torch.inference_mode():
        cost = measure_device_cost(random_experts(3, 0, hidden_size=64, width=32), comm, transfers, "grouped_mm")
    transfers.close()
    comm.close()
    return cost


@pytest.mark.ranks
@pytest.mark.parametrize("exchange", [Exchange.PUT, Exchange.COLLECTIVE])
def test_ranks_agree_on_what_they_measured(exchange: str, tmp_path: Path) -> None:
    first, second = run_ranks(2, measured_on, tmp_path, exchange)
    assert first.numbers() == second.numbers()
    assert first.grouped
    assert min(first.token_s, first.fetch_s, first.exchange_token_s, first.peer_fetch_s, first.copy_token_s + 1e-30) > 0
    assert first.peer_fetch_s > first.exchange_latency_s
    assert first.fetch_together_s > 0
    assert first.early_s > 0, "rows are at least gathered and added up"


class TakesTurns(Transfers):
    """A link that two ranks share: two copies of a microsecond each, then two of the other rank until it is through."""

    def __init__(self, num_copies: int) -> None:
        self.num_copies, self.num_submitted, self.now_ns = num_copies, 0, 0

    def submit(self, request: CopyRequest) -> Transfer:
        del request
        begin_ns = self.now_ns
        self.num_submitted += 1
        self.now_ns += 1000
        if self.num_submitted % 2 == 0 and self.num_submitted < 0.8 * self.num_copies:
            self.now_ns += 2000
        return Transfer(span=(begin_ns, begin_ns + 1000))

    def beside(self, work: Callable[[], None]) -> Any:
        raise NotImplementedError

    def wait(self, slot: Slot) -> None:
        del slot

    def drain(self) -> None:
        pass


@pytest.mark.parametrize(("alone_s", "num_copies"), [(1.0, 14), (1e-4, 50), (1e-9, 256)])
def test_ranks_copy_at_once_for_long_enough(alone_s: float, num_copies: int) -> None:
    """On an H200 every copy of one of 8 ranks was as fast as alone, and all together took 8 times as long."""
    experts = random_experts(3, 0)
    slot = LayerSlots(experts, CPU).reserve(1)[0]
    transfers = TakesTurns(num_copies)
    together_s = fetch_together_s(experts, slot, transfers, Communicator(CPU), alone_s)
    assert transfers.num_submitted == num_copies
    assert together_s == pytest.approx(2e-6, rel=0.15)


def test_one_rank_sends_nobody_anything() -> None:
    transfers = make_transfers(CPU, Hardware())
    cost = measure_device_cost(random_experts(2, 0), Communicator(CPU), transfers, KernelName.LOOP)
    transfers.close()
    assert (cost.grouped, cost.exchange_token_s, cost.peer_fetch_s, cost.fetch_together_s) == (False, 0.0, 0.0, 0.0)
    assert cost.token_s > 0
