"""The CUDA path: the same exactness when streams run in another order than they were filled. Skips without a device."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from harmoeny.head_start import HeadStart
from harmoeny.runtime.device import span_s
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.experts import ExpertStore
from harmoeny.runtime.memory.slots import LayerSlots, Slot
from harmoeny.runtime.memory.transfer import CopyRequest, StreamTransfers
from tests.harmoeny.runtime.cases import RandomPlan, expected_output, random_experts, random_tokens, start

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this PyTorch sees none"),
]

NUM_EXPERTS = 6
#: Long enough for the other stream to overtake: about a millisecond.
_CYCLES = 2_000_000


class SlowStreams(StreamTransfers):
    """Puts pauses into the copy streams, before and between the copies of one expert."""

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device)
        self.random = random.Random(seed)

    def move(self, slot: Slot, source: Mapping[str, Tensor]) -> None:
        for name, buffer in slot.buffers.items():
            torch.cuda._sleep(self.random.choice([0, 0, _CYCLES]))
            buffer.copy_(source[name], non_blocking=True)
        slot.refer(slot.buffers)


@pytest.mark.parametrize("num_slots", [1, 2, 3, NUM_EXPERTS])
@pytest.mark.parametrize("fetch", ["sync", "async"])
@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (torch.float32, "auto"), (torch.float16, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "triton"),
        (torch.bfloat16, "loop"),
    ],
)  # fmt: skip
def test_exact_whatever_the_order_of_streams(num_slots: int, fetch: str, dtype: torch.dtype, kernel: str) -> None:
    device = torch.device("cuda")
    layers = [random_experts(NUM_EXPERTS, seed, width=16, dtype=dtype) for seed in range(3)]
    transfers = SlowStreams(device, seed=num_slots)
    engine = start(layers, Communicator(device), transfers=transfers, kernel=kernel)
    rng = random.Random(num_slots)
    with torch.inference_mode():
        # One rank is home to all experts, and has slots for some.
        engine.use(engine.build_system("x", RandomPlan(0, fetch=fetch, num_slots=num_slots)))
        outputs, wanted = [], []
        for batch in range(3):
            engine.recorder.begin_iteration()
            for layer in range(len(layers)):
                t = random_tokens(10 * batch + layer, 64, NUM_EXPERTS, 2, dtype=dtype, masked=0.1)
                torch.cuda._sleep(rng.choice([0, _CYCLES]))  # computation lags behind, loads must not run ahead of it
                engine.recorder.begin_layer(layer)
                outputs.append(engine.forward(layer, t.hidden.cuda(), t.ids.cuda(), t.weights.cuda()))
                wanted.append(expected_output(layers[layer], t.hidden, t.ids, t.weights, t.ids >= 0))
        engine.finish()
        records = engine.recorder.collect()
        engine.close()
    for output, expected in zip(outputs, wanted, strict=True):
        error = (output.cpu().double() - expected).abs().max() / expected.abs().max()
        assert error <= (1e-3 if dtype == torch.float32 else 4e-2)  # TF32 is off by default, sums run in another order
    assert all(r.boundary_s == sorted(r.boundary_s) for r in records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_slots", "most"), [(NUM_EXPERTS, 0), (2, 1)])
def test_the_host_waits_once_for_the_counts_and_never_where_it_need_not_plan(
    dtype: torch.dtype, num_slots: int, most: int
) -> None:
    device = torch.device("cuda")
    engine = start([random_experts(NUM_EXPERTS, 0, width=16, dtype=dtype)], Communicator(device))
    tokens = random_tokens(0, 64, NUM_EXPERTS, 2, dtype=dtype, masked=0.1)
    given = (tokens.hidden.cuda(), tokens.ids.cuda(), tokens.weights.cuda())
    with torch.inference_mode():
        engine.use(engine.build_system("x", RandomPlan(0, num_slots=num_slots)))
        engine.recorder.begin_iteration()
        for waits in (False, True):  # the first call loads and compiles
            engine.recorder.begin_layer(0)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn" if waits else "default")
                engine.forward(0, *given)
                torch.cuda.set_sync_debug_mode("default")
    engine.close()
    assert len([w for w in seen if "synchroniz" in str(w.message)]) <= most


def test_counts_do_not_wait_for_what_is_queued_after_them() -> None:
    device = torch.device("cuda")
    comm, counts = Communicator(device), torch.arange(5, device="cuda")
    end = torch.cuda.Event()
    torch.cuda.synchronize()
    gathered = comm.begin_counts(counts)
    torch.cuda._sleep(50 * _CYCLES)
    end.record()
    assert gathered().tolist() == [[0, 1, 2, 3, 4]]
    assert not end.query()


class AskedForPlans(RandomPlan):
    """Is asked for a plan even by one rank."""

    exact: ClassVar[bool] = False


@pytest.mark.parametrize("kernel", ["auto", "triton", "loop"])
def test_early_rows_are_exact(kernel: str) -> None:
    device = torch.device("cuda")
    experts = random_experts(NUM_EXPERTS, 0, width=16, dtype=torch.bfloat16)
    engine = start([experts], Communicator(device), kernel=kernel)
    early = HeadStart(most_rows=40, slice_rows=0, least_rows=4, tile_rows=4, batch_rows=1000)
    with torch.inference_mode():
        engine.use(engine.build_system("x", AskedForPlans(0, early=early)))
        for batch in range(3):
            t = random_tokens(batch, 64, NUM_EXPERTS, 2, dtype=torch.bfloat16, masked=0.1)
            engine.recorder.begin_iteration()
            engine.recorder.begin_layer(0)
            output = engine.forward(0, t.hidden.cuda(), t.ids.cuda(), t.weights.cuda())
            wanted = expected_output(experts, t.hidden, t.ids, t.weights, t.ids >= 0)
            assert (output.cpu().double() - wanted).abs().max() <= 4e-2 * wanted.abs().max()
            (times,) = engine.recorder.collect()
            assert times.marks.plan is not None
            assert times.marks.plan.early is not None
    engine.close()


def test_copies_do_not_block_the_host_and_overlap_with_computation() -> None:
    device = torch.device("cuda")
    experts = random_experts(4, 0, hidden_size=4096)
    store = ExpertStore([experts], pin=True)
    transfers = StreamTransfers(device)
    slots = LayerSlots(store.layers[0], device).reserve(4)
    for slot in slots:
        transfers.submit(CopyRequest(slot, 0, store.layers[0].expert(0)))
        transfers.wait(slot)
    transfers.drain()
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    copies = [transfers.submit(CopyRequest(slot, e, store.layers[0].expert(e))) for e, slot in enumerate(slots)]
    torch.cuda._sleep(50 * _CYCLES)
    end.record()
    assert not end.query(), "submitting waited for the device"
    transfers.drain()
    torch.cuda.synchronize()
    for transfer in copies:
        assert transfer.span is not None
        assert span_s((begin, transfer.span[1])) < span_s((begin, end)), "the copy waited for what was queued later"
    for e, slot in enumerate(slots):
        assert torch.equal(slot.weights["up"].cpu(), experts.weights["up"][e])


def test_pinned_in_place_where_no_pages_are_shared() -> None:
    for size, in_place in ((2048, True), (8, False)):
        experts = random_experts(4, 1, hidden_size=size, width=size)
        store = ExpertStore([experts], pin=True)
        for name, weights in experts.weights.items():
            pinned = store.layers[0].weights[name]
            assert (pinned.data_ptr() == weights.data_ptr()) == in_place
            assert pinned.is_pinned()
            assert torch.equal(pinned, weights)
        store.close()
