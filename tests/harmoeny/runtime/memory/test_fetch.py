"""Slots and copies under random delays: weights that an expert computes with must be its own, from begin to end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from harmoeny.cost import ExpertCost
from harmoeny.hardware import Hardware
from harmoeny.placement import IntArray, Placement
from harmoeny.runtime.device import span_s
from harmoeny.runtime.memory.experts import LayerExperts, halves_of
from harmoeny.runtime.memory.fetch import make_fetcher
from harmoeny.runtime.memory.fetch.base import FetchOptions, FetchStats, FetchStrategy, RankMemory
from harmoeny.runtime.memory.fetch.none import NoFetch
from harmoeny.runtime.memory.links import EmulatedTransfers, make_transfers
from harmoeny.runtime.memory.slots import LayerSlots, Slot, Transfer
from harmoeny.runtime.memory.transfer import CopyRequest, ThreadTransfers
from harmoeny.runtime.memory.waves import Wave
from tests.harmoeny.runtime.cases import CPU, RandomPlan, start

NUM_EXPERTS = 6
NO_FETCH = np.zeros((NUM_EXPERTS, 1), np.bool_)


def marked_experts(size: int = 64) -> LayerExperts:
    """Every weight of expert e is the number e."""
    marks = torch.arange(NUM_EXPERTS, dtype=torch.float32).view(-1, 1, 1)
    weights = {name: marks.expand(-1, size, size).contiguous() for name in ("up", "down")}
    return LayerExperts(weights, lambda *_: None, size)


class SlowCopies(ThreadTransfers):
    """Copies tensor by tensor with random pauses, as another order of streams would."""

    pauses_s: ClassVar[list[float]] = [0, 0, 0.0003, 0.001]

    def __init__(self, hardware: Hardware, seed: int) -> None:
        self.random = random.Random(seed)
        super().__init__(hardware)

    def move(self, slot: Slot, source: Mapping[str, Tensor]) -> None:
        for name, buffer in slot.buffers.items():
            time.sleep(self.random.choice(self.pauses_s))
            buffer.copy_(source[name])
        slot.refer(slot.buffers)


class RaceDetector:
    """Executes nothing, but looks at all weights of a wave again and again in the time that computing would take."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.slots = LayerSlots(marked_experts(), CPU)
        self.executed = np.zeros((0, NUM_EXPERTS), np.int64)

    def __call__(self, wave: Wave) -> None:
        for _ in range(3):
            for expert_id, slot in zip(wave.expert_ids, wave.slots, strict=True):
                for name, tensor in self.slots.slots[slot].weights.items():
                    assert (tensor == expert_id).all(), f"expert {expert_id} computes with {tensor}"
                    assert (self.slots.weights[name][slot] == expert_id).all(), "the pool is what the slots hold"
            time.sleep(self.random.choice([0, 0, 0.0003, 0.0007]))
        self.executed[wave.stage, wave.expert_ids] += wave.num_tokens


def nanoseconds(transfer: Transfer) -> tuple[int, int]:
    assert transfer.span is not None
    begin, end = transfer.span
    assert isinstance(begin, int)
    assert isinstance(end, int)
    return begin, end


def fetcher(
    link: ThreadTransfers, *, fetch: str = "async", resident: range = range(3), num_slots: int | None = None,
    num_layers: int = 1,
) -> FetchStrategy:  # fmt: skip
    layers = [marked_experts() for _ in range(num_layers)]
    held = np.zeros((NUM_EXPERTS, 1), np.bool_)
    held[list(resident)] = True
    placement = Placement(np.zeros(NUM_EXPERTS, np.int64), held)
    memory = start(layers, transfers=link, cost=ExpertCost(token_s=1e-4, fetch_s=2e-3)).memory
    strategy = make_fetcher(RandomPlan(0, fetch=fetch, num_slots=num_slots), [placement] * num_layers, memory)
    strategy.prepare()
    return strategy


def work(*experts: int, num_tokens: int = 5) -> IntArray:
    """As many tokens for each of the experts."""
    executed = np.zeros((1, NUM_EXPERTS), np.int64)
    executed[0, list(experts)] = num_tokens
    return executed


def one_layer(
    strategy: FetchStrategy, layer: int, executed: IntArray, detector: RaceDetector, *, grouped: bool = False
) -> FetchStats:
    detector.slots, detector.executed = strategy.memory.pool.layers[layer], np.zeros_like(executed)
    strategy.begin(layer, NO_FETCH, executed, grouped=grouped)
    stats = strategy.run(detector)
    assert (detector.executed == executed).all()
    return stats


@pytest.mark.many
@pytest.mark.parametrize("fetch", ["sync", "async", "peer"])
@pytest.mark.parametrize("num_slots", [1, 2, 3, 4, NUM_EXPERTS])
@pytest.mark.parametrize("grouped", [False, True])
def test_no_slot_is_overwritten_while_its_expert_computes(fetch: str, num_slots: int, grouped: bool) -> None:
    link = SlowCopies(Hardware(), seed=num_slots)
    strategy = fetcher(link, fetch=fetch, num_slots=num_slots, num_layers=2)
    rng = np.random.default_rng(num_slots)
    detector = RaceDetector(num_slots)
    for num_stages in (1, 3) * 3:
        # Layers follow each other without a pause, so restores of one batch are under way in the next. Stages repeat
        # experts, so that one may be fetched, overwritten and fetched again.
        for layer in range(2):
            shape = (num_stages, NUM_EXPERTS)
            executed = rng.integers(1, 30, shape) * (rng.random(shape) < 0.5)
            one_layer(strategy, layer, executed, detector, grouped=grouped)
    strategy.finish()
    link.close()


@pytest.mark.parametrize("grouped", [False, True])
def test_the_detector_detects(grouped: bool) -> None:
    """The same work on a strategy that reuses a slot without waiting for its user must be caught."""

    class Reckless(SlowCopies):
        pauses_s: ClassVar[list[float]] = [0.02]

        def wait(self, slot: Slot) -> None:
            slot.transfer = None

    link = Reckless(Hardware(), seed=1)
    strategy = fetcher(link)
    with pytest.raises(AssertionError, match="computes with"):
        one_layer(strategy, 0, work(*range(NUM_EXPERTS)), RaceDetector(1), grouped=grouped)


def test_residents_come_back_behind_later_layers() -> None:
    link = SlowCopies(Hardware(), seed=2)
    strategy = fetcher(link)
    stats = one_layer(strategy, 0, work(*range(NUM_EXPERTS)), RaceDetector(2))
    assert stats.num_host_fetches == 3
    assert 1 <= len(stats.restores) <= 2
    strategy.finish()
    held = {slot.expert_id for slot in strategy.memory.pool.layers[0].slots}
    assert held == {0, 1, 2}
    for slot in strategy.memory.pool.layers[0].slots:
        assert (slot.weights["up"] == slot.expert_id).all()
    stats = one_layer(strategy, 0, work(0, 1, 2), RaceDetector(2))
    assert (stats.num_host_fetches, stats.restores) == (0, [])
    link.close()


def test_systems_take_turns_with_one_pool() -> None:
    link = SlowCopies(Hardware(), seed=3)
    first = fetcher(link, num_slots=2)
    second_memory = RankMemory(first.memory.store, first.memory.pool, link, first.memory.comm, first.memory.cost)
    held = np.zeros((NUM_EXPERTS, 1), np.bool_)
    held[3:] = True
    other = make_fetcher(RandomPlan(0, num_slots=3), [Placement(np.zeros(NUM_EXPERTS, np.int64), held)], second_memory)
    for strategy in (other, first, other, first):
        strategy.prepare()
        one_layer(strategy, 0, work(*range(NUM_EXPERTS)), RaceDetector(3))
        strategy.finish()
    assert len(first.memory.pool.layers[0].slots) == 3
    assert (first.device_bytes, other.device_bytes) == (2 * 2 * 64 * 64 * 4, 3 * 2 * 64 * 64 * 4)
    link.close()


@pytest.mark.parametrize("fetch", ["sync", "async"])
def test_a_new_placement_moves_weights(fetch: str) -> None:
    link = SlowCopies(Hardware(), seed=4)
    strategy = fetcher(link, fetch=fetch)
    resident = np.zeros((NUM_EXPERTS, 1), np.bool_)
    resident[[1, 4, 5]] = True
    strategy.replace_residents(0, Placement(np.zeros(NUM_EXPERTS, np.int64), resident))
    stats = one_layer(strategy, 0, work(1, 4, 5), RaceDetector(4))
    assert (stats.num_host_fetches, len(stats.fetches)) == (2, 2), (
        "the moves are counted in the batch that pays for them"
    )
    assert stats.restore_waits == [], "waits for new residents are waits for fetches"
    assert stats.fetch_bytes == 2 * strategy.memory.store.layers[0].expert_bytes
    stats = one_layer(strategy, 0, work(1, 4, 5), RaceDetector(4))
    assert stats.num_host_fetches == 0
    strategy.finish()
    assert {slot.expert_id for slot in strategy.memory.pool.layers[0].slots} == {1, 4, 5}
    link.close()


def test_an_emulated_link_takes_its_time_and_no_less() -> None:
    experts = marked_experts()
    hardware = Hardware(
        host_link="emulated", host_link_bytes_per_s=experts.expert_bytes / 0.02, host_link_latency_s=0.01
    )
    link = make_transfers(CPU, hardware)
    other, slot = LayerSlots(experts, CPU).reserve(2)
    transfers = [link.submit(CopyRequest(s, e, experts.expert(e))) for e, s in ((1, other), (2, slot))]
    link.wait(slot)
    assert (slot.weights["up"] == 2).all()
    link.drain()
    assert all(span_s(t.span) >= 0.03 for t in transfers if t.span is not None)
    assert nanoseconds(transfers[1])[0] >= nanoseconds(transfers[0])[1], "one link carries one expert at a time"
    link.close()


def test_a_fetch_goes_before_restores() -> None:
    experts = marked_experts()
    link = make_transfers(CPU, Hardware(host_link="emulated", host_link_bytes_per_s=experts.expert_bytes / 0.01))
    slots = LayerSlots(experts, CPU).reserve(4)
    restores = [link.submit(CopyRequest(slot, 0, experts.expert(0), urgent=False)) for slot in slots[:3]]
    fetch = link.submit(CopyRequest(slots[3], 1, experts.expert(1)))
    link.drain()
    assert nanoseconds(fetch)[1] < nanoseconds(restores[1])[1], "only the restore that was under way came first"
    link.close()


def test_an_emulated_link_is_done_when_it_would_be_whether_anybody_looks_or_not() -> None:
    """Three copies of 10 ms, behind each other; who comes after 100 ms finds them done at 30, and waits no more."""
    experts = marked_experts()
    link = make_transfers(CPU, Hardware(host_link="emulated", host_link_bytes_per_s=experts.expert_bytes / 0.01))
    assert isinstance(link, EmulatedTransfers)
    slots = LayerSlots(experts, CPU).reserve(3)
    begin = time.perf_counter_ns()
    transfers = [link.submit(CopyRequest(slot, slot.index, experts.expert(slot.index))) for slot in slots]
    assert link.wait(slots[0]) is not None
    time.sleep(0.1)
    assert link.wait(slots[2]) is None
    assert [round((nanoseconds(t)[1] - begin) / 1e7) for t in transfers] == [1, 2, 3]
    late = link.submit(CopyRequest(slots[0], 2, experts.expert(2)))
    assert link.wait(slots[0]) is not None
    assert nanoseconds(late)[0] >= begin + 100_000_000
    assert all((slot.weights["up"] == expert).all() for slot, expert in zip(slots, (2, 1, 2), strict=True))
    link.close()


def numbered_experts() -> LayerExperts:
    """All numbers differ; matrices have an even number of rows, an odd one and one, and others are no matrices."""
    weights: dict[str, Tensor] = {}
    for i, shape in enumerate([(6, 4), (5, 3), (1, 8), (7,), (1,), ()]):
        size = NUM_EXPERTS * int(np.prod(shape))
        weights[f"w{i}"] = torch.arange(size, dtype=torch.float32).view(NUM_EXPERTS, *shape) + 1000 * i
    return LayerExperts(weights, lambda *_: None, 4)


@pytest.mark.parametrize("kind", ["copied", "thread", "emulated"])
def test_an_expert_of_which_peers_send_half_is_the_whole_one(kind: str) -> None:
    """What is not to be read from a source is wrong there, unless it is where a slot refers to."""
    experts = numbered_experts()
    hardware = Hardware(host_link="memcpy" if kind == "copied" else "emulated", host_link_bytes_per_s=1e6)
    link = EmulatedTransfers(hardware) if kind == "emulated" else ThreadTransfers(hardware)
    slots, arrived, log = LayerSlots(experts, CPU).reserve(2), threading.Event(), []
    submitted = threading.Event()
    link.beside(lambda: submitted.wait(30))  # else the copy thread may wait for the first before the second is there
    for slot in slots:
        weights = experts.expert(slot.index + 1)
        halves = {name: halves_of(weight)[0].clone() for name, weight in weights.items()}
        rest = weights
        if kind == "copied":
            rest = {name: weight.clone() for name, weight in weights.items()}
            for weight in rest.values():
                halves_of(weight)[0].fill_(-1.0)
        sent = {name: half for name, half in halves.items() if len(half) > 0}
        assert sorted(sent) == ["w0", "w1", "w3"]
        source = {name: torch.full_like(half, -1.0) for name, half in sent.items()}

        def arrival(source: dict[str, Tensor] = source, sent: dict[str, Tensor] = sent) -> None:
            assert arrived.wait(30)
            for name, half in sent.items():
                source[name].copy_(half)
            log.append("arrived")

        link.submit(CopyRequest(slot, slot.index + 1, source, arrival=arrival, rest=rest))
    submitted.set()
    if kind == "copied":
        deadline = time.monotonic() + 30
        while not (slots[1].buffers["w0"][3:] == experts.weights["w0"][2, 3:]).all():
            assert time.monotonic() < deadline, "what the host has is copied before anything arrives"
            time.sleep(0.001)
    assert log == []
    threading.Timer(0.02, arrived.set).start()
    for slot in slots:
        transfer = slot.transfer
        link.wait(slot)
        for name, weight in experts.expert(slot.index + 1).items():
            assert torch.equal(slot.weights[name], weight), name
        assert transfer is not None
        assert transfer.span is not None
    assert log == ["arrived", "arrived"]
    link.close()


def test_half_an_expert_takes_half_of_an_emulated_link() -> None:
    experts = marked_experts()
    link = make_transfers(CPU, Hardware(host_link="emulated", host_link_bytes_per_s=experts.expert_bytes / 0.02))
    whole, half, late = LayerSlots(experts, CPU).reserve(3)

    def request(slot: Slot, seconds: float) -> CopyRequest:
        weights = experts.expert(slot.index)
        return CopyRequest(slot, slot.index, weights, arrival=lambda: time.sleep(seconds), rest=weights)

    transfers = [link.submit(request(half, 0.0)), link.submit(CopyRequest(whole, 0, experts.expert(0)))]
    transfers.append(link.submit(request(late, 0.1)))
    for slot in (half, whole, late):
        assert link.wait(slot) is not None
    (begin, half_ns), (whole_begin, whole_ns), (_, late_ns) = map(nanoseconds, transfers)
    assert half_ns - begin == 10_000_000
    assert (whole_begin, whole_ns - whole_begin) == (half_ns, 20_000_000)
    assert late_ns - begin >= 100_000_000, "when the peer's half was there"
    link.close()


def test_half_an_expert_that_fails_to_arrive_is_raised_where_it_is_waited_for() -> None:
    experts = marked_experts()

    def arrival() -> None:
        raise OSError("the peer is gone")

    emulated = Hardware(host_link="emulated", host_link_bytes_per_s=experts.expert_bytes / 0.001)
    for link in (ThreadTransfers(Hardware()), make_transfers(CPU, emulated)):
        (slot,) = LayerSlots(experts, CPU).reserve(1)
        link.submit(CopyRequest(slot, 0, {}, arrival=arrival, rest=experts.expert(0)))
        with pytest.raises(RuntimeError, match="copying an expert failed: the peer is gone"):
            link.wait(slot)
        link.close()


def test_a_copy_that_fails_is_raised_where_it_is_waited_for() -> None:
    link = ThreadTransfers(Hardware())
    experts = marked_experts()
    (slot,) = LayerSlots(experts, CPU).reserve(1)
    link.submit(CopyRequest(slot, 0, {"up": torch.zeros(3), "down": torch.zeros(3)}))
    with pytest.raises(RuntimeError, match="copying an expert failed"):
        link.wait(slot)
    link.close()


def test_no_fetch_needs_all_experts_resident() -> None:
    engine = start([marked_experts()])
    held = np.ones((NUM_EXPERTS, 1), np.bool_)
    held[2] = False
    with pytest.raises(ValueError, match="fetch: 'none'"):
        NoFetch(engine.memory, FetchOptions([Placement(np.zeros(NUM_EXPERTS, np.int64), held)], [None]))
    engine.close()


def test_slots_that_were_made_in_inference_mode_are_filled_outside_of_it() -> None:
    experts = LayerExperts({"down": torch.randn(2, 4, 4)}, lambda *_: None, 4)
    (slot,) = LayerSlots(experts, CPU).reserve(1)
    with torch.inference_mode():
        slot.fill(experts.expert(0))
    slot.fill(experts.expert(1))
    assert torch.equal(slot.weights["down"], experts.weights["down"][1])
