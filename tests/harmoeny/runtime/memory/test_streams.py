"""What is ordered behind what on CUDA's streams, on streams that only remember it: no device is needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines.static_ep import StaticEP
from harmoeny.cost import ExpertCost
from harmoeny.placement import Placement
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.experts import ExpertStore
from harmoeny.runtime.memory.fetch import make_fetcher
from harmoeny.runtime.memory.fetch.base import RankMemory
from harmoeny.runtime.memory.slots import LayerSlots, Slot, SlotPool, Transfer
from harmoeny.runtime.memory.transfer import CopyRequest, StreamTransfers
from harmoeny.runtime.memory.waves import Wave
from tests.harmoeny.runtime.cases import random_experts

META = torch.device("meta")
NUM_EXPERTS = 6


class Work(NamedTuple):
    """Something that was queued, and what is over when it begins."""

    number: int
    kind: str
    slots: frozenset[int]
    expert_ids: frozenset[int]
    after: frozenset[int]


class Stream:
    """Remembers what is over when what is queued next begins."""

    def __init__(self, *_: object, **__: object) -> None:
        self.over: frozenset[int] = frozenset()

    def wait_stream(self, other: Stream) -> None:
        self.over |= other.over

    def wait_event(self, event: Event) -> None:
        self.over |= event.over

    def synchronize(self) -> None:
        pass


class Event:
    #: Whether the device has done all that was queued.
    all_over = True

    def __init__(self, **_: object) -> None:
        self.over: frozenset[int] = frozenset()

    def record(self, stream: Stream) -> None:
        self.over = stream.over

    def query(self) -> bool:
        return Event.all_over


class Log:
    """The current stream, and all work in the order in which it was queued."""

    def __init__(self) -> None:
        self.compute = self.current = Stream()
        self.work: list[Work] = []

    def queue(self, kind: str, slots: set[int], expert_ids: set[int]) -> None:
        number = len(self.work)
        self.work.append(Work(number, kind, frozenset(slots), frozenset(expert_ids), self.current.over))
        self.current.over |= {number}

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self.current = stream
        yield
        self.current = self.compute


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", log.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: log.compute)
    return log


def recorded(log: Log) -> StreamTransfers:
    class Recorded(StreamTransfers):
        def move(self, slot: Slot, source: Mapping[str, Tensor]) -> None:  # noqa: ARG002
            log.queue("copy", {slot.index}, {slot.expert_id})

        def move_rest(self, slot: Slot, rest: Mapping[str, Tensor]) -> None:  # noqa: ARG002
            log.queue("rest", {slot.index}, {slot.expert_id})

        def move_first(self, slot: Slot, source: Mapping[str, Tensor]) -> None:  # noqa: ARG002
            log.queue("first", {slot.index}, {slot.expert_id})

    return Recorded(META)


def run(log: Log, fetch: str, *, grouped: bool, num_residents: int = 3) -> list[Work]:
    """Two batches of one layer of equal slices; the work after the residents were copied in."""

    store = ExpertStore([random_experts(NUM_EXPERTS, 0)])
    memory = RankMemory(store, SlotPool(store, META), recorded(log), Communicator(META), ExpertCost(1.0, 4.0))
    held = (np.arange(NUM_EXPERTS) < num_residents)[:, None]
    strategy = make_fetcher(StaticEP(fetch=fetch), [Placement(np.zeros(NUM_EXPERTS, np.int64), held)], memory)
    strategy.prepare()
    begin = len(log.work)

    def execute(wave: Wave) -> None:
        log.queue("compute", set(wave.slots), set(wave.expert_ids))

    for _ in range(2):
        log.queue("compute", set(), set())  # the layers before
        strategy.begin(0, ~held, np.full((1, NUM_EXPERTS), 5), grouped=grouped)
        strategy.run(execute)
    return log.work[begin:]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("fetch", ["sync", "async"])
def test_an_expert_computes_after_its_copy_and_is_overwritten_after_its_computation(
    log: Log, fetch: str, grouped: bool
) -> None:
    work = run(log, fetch, grouped=grouped)
    assert {w.kind for w in work} == {"copy", "compute"}
    for index, later in enumerate(work):
        for earlier in work[:index]:
            if earlier.slots & later.slots and "copy" in (earlier.kind, later.kind):
                assert earlier.number in later.after, f"{later} may begin before {earlier} is over"


@pytest.mark.parametrize("grouped", [False, True])
def test_blocking_fetches_stop_computation(log: Log, grouped: bool) -> None:
    work = run(log, "sync", grouped=grouped)
    copies = [w for w in work if w.kind == "copy"]
    assert len(copies) >= 2 * (NUM_EXPERTS - 3), "fetches and restores"
    for copy in copies:
        for other in work:
            if other.kind == "compute":
                assert copy.number in other.after or other.number in copy.after, f"{copy} overlaps with {other}"


@pytest.mark.parametrize("grouped", [False, True])
def test_fetches_ahead_overlap_with_computation(log: Log, grouped: bool) -> None:
    work = run(log, "async", grouped=grouped)
    computing = [w for w in work if w.kind == "compute" and w.slots]
    overlapping = [
        copy
        for copy in work
        if copy.kind == "copy" and any(copy.number not in w.after and w.number not in copy.after for w in computing)
    ]
    assert len(overlapping) >= 2


class TestRestores:
    @pytest.fixture
    def transfers(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> StreamTransfers:
        monkeypatch.setattr(Event, "all_over", False)
        return recorded(log)

    @pytest.fixture
    def slots(self) -> list[Slot]:
        return list(LayerSlots(random_experts(NUM_EXPERTS, 0), META).reserve(4))

    def copied(self, log: Log) -> list[int]:
        return [next(iter(w.expert_ids)) for w in log.work]

    def submit(self, transfers: StreamTransfers, slot: Slot, expert_id: int, *, urgent: bool = False) -> Transfer:
        return transfers.submit(CopyRequest(slot, expert_id, slot.layer.experts.expert(expert_id), urgent))

    def test_a_fetch_finds_no_more_than_one_before_it(
        self, log: Log, transfers: StreamTransfers, slots: list[Slot]
    ) -> None:
        for expert_id, slot in enumerate(slots[:3]):
            self.submit(transfers, slot, expert_id)
        assert self.copied(log) == [0]
        self.submit(transfers, slots[3], 5, urgent=True)
        assert self.copied(log) == [0, 5]
        assert log.work[1].after == frozenset(), "a fetch waits for no restore"
        transfers.drain()
        assert self.copied(log) == [0, 5, 1, 2]

    def test_they_go_on_while_the_host_has_other_calls(
        self, log: Log, transfers: StreamTransfers, slots: list[Slot], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for expert_id, slot in enumerate(slots[:3]):
            self.submit(transfers, slot, expert_id)
        monkeypatch.setattr(Event, "all_over", True)
        transfers.wait(slots[3])
        transfers.wait(slots[3])
        assert self.copied(log) == [0, 1, 2]

    def test_they_go_on_in_layers_that_fetch_nothing(self, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Event, "all_over", False)
        store = ExpertStore([random_experts(NUM_EXPERTS, seed) for seed in range(2)])
        memory = RankMemory(store, SlotPool(store, META), recorded(log), Communicator(META), ExpertCost(1.0, 4.0))
        held = (np.arange(NUM_EXPERTS) < 3)[:, None]
        placements = [Placement(np.zeros(NUM_EXPERTS, np.int64), held)] * 2
        strategy = make_fetcher(StaticEP(fetch="async"), placements, memory)
        strategy.prepare()
        before = len(log.work)
        first = strategy.begin(0, ~held, np.full((1, NUM_EXPERTS), 5))
        strategy.run(lambda _: None)
        assert len(first.restores) >= 2
        assert len(log.work) == before + len(first.fetches)
        monkeypatch.setattr(Event, "all_over", True)  # the device is through with what was queued
        strategy.begin(1, held & False, np.where(held.T, 5, 0))
        strategy.run(lambda _: None)
        assert len(log.work) == before + len(first.fetches) + len(first.restores)

    def test_one_that_is_needed_is_copied_at_once(
        self, log: Log, transfers: StreamTransfers, slots: list[Slot]
    ) -> None:
        for expert_id, slot in enumerate(slots[:3]):
            self.submit(transfers, slot, expert_id)
        assert transfers.wait(slots[2]) is not None
        assert self.copied(log) == [0, 2]
        assert log.work[1].number in log.compute.over

    def test_one_whose_slot_is_wanted_again_is_left_out(
        self, log: Log, transfers: StreamTransfers, slots: list[Slot]
    ) -> None:
        first = self.submit(transfers, slots[0], 0)
        dropped = self.submit(transfers, slots[1], 1)
        self.submit(transfers, slots[1], 4, urgent=True)
        transfers.drain()
        assert self.copied(log) == [0, 4]
        assert (first.span is None, dropped.span is None) == (False, True)
        assert slots[1].expert_id == 4


def test_halves_from_the_host_wait_for_none_from_peers(log: Log) -> None:
    transfers, slots = recorded(log), LayerSlots(random_experts(NUM_EXPERTS, 0), META).reserve(2)
    log.queue("compute", set(), set())
    for slot in slots:

        def arrival(index: int = slot.index) -> None:
            log.queue("arrival", {index}, set())

        transfers.submit(CopyRequest(slot, slot.index, {}, arrival=arrival, rest={}))
    for slot in slots:
        transfers.wait(slot)
        log.queue("compute", {slot.index}, {slot.expert_id})
    by = {(work.kind, *work.slots): work for work in log.work}
    for index in range(2):
        assert by["rest", index].after == {0, *(by["rest", i].number for i in range(index))}, "no arrival"
        assert by["rest", index].number in by["first", index].after, "the slot's content before is read no more"
        assert by["arrival", index].number in by["first", index].after
        assert {by["rest", index].number, by["first", index].number} <= by["compute", index].after
    transfers.drain()
