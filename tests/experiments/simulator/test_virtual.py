"""The runtime's fetch strategies on a virtual clock: one token takes 1 s, one copy 4 s unless a test says otherwise."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from baselines.static_ep import StaticEP
from experiments.simulator.virtual import META, VirtualCommunicator, VirtualTransfers
from harmoeny.cost import ExpertCost
from harmoeny.hardware import Hardware
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.runtime.device import span_s
from harmoeny.runtime.memory.experts import ExpertStore
from harmoeny.runtime.memory.fetch import make_fetcher
from harmoeny.runtime.memory.fetch.base import FetchStats, FetchStrategy, RankMemory
from harmoeny.runtime.memory.slots import LayerSlots, SlotPool, Transfer
from harmoeny.runtime.memory.transfer import CopyRequest, ThreadTransfers
from harmoeny.runtime.memory.waves import Wave
from tests.harmoeny.runtime.cases import random_experts, start

COST = ExpertCost(token_s=1.0, fetch_s=4.0)
NUM_EXPERTS = 9
COPY_S = 4.0


def placement(residents: Sequence[int]) -> Placement:
    """Rank 0 holds the residents, rank 1 is the home of all others."""
    resident = np.zeros((NUM_EXPERTS, 2), np.bool_)
    resident[list(residents), 0] = True
    resident[:, 1] = ~resident[:, 0]
    return Placement(resident.argmax(axis=1).astype(np.int64), resident)


def executed(*stages: dict[int, int]) -> IntArray:
    """Tokens by expert, for every stage."""
    counts = np.zeros((len(stages), NUM_EXPERTS), np.int64)
    for stage, tokens in enumerate(stages):
        for expert_id, num_tokens in tokens.items():
            counts[stage, expert_id] = num_tokens
    return counts


@dataclass
class Rank:
    """Rank 0 of two, its memory, and its virtual clock."""

    residents: Sequence[int]
    fetch: str = "async"
    order: str = "paper"
    share: float = 0.0
    transfers: VirtualTransfers = field(init=False)
    comm: VirtualCommunicator = field(init=False)
    strategy: FetchStrategy = field(init=False)

    def __post_init__(self) -> None:
        store = ExpertStore([random_experts(NUM_EXPERTS, 0)])
        self.transfers = VirtualTransfers(self.share)
        self.transfers.copy_s = COPY_S
        self.comm = VirtualCommunicator(0, 2, self.transfers)
        memory = RankMemory(store, SlotPool(store, META), self.transfers, self.comm, COST)
        policy = StaticEP(fetch=self.fetch, work_order=self.order)
        self.strategy = make_fetcher(policy, [placement(self.residents)], memory)

    def run(self, tokens: dict[int, int], *, planned_s: float = 0.0, start_s: float = 1.0) -> Done:
        """Execute tokens by expert."""
        fetch = np.zeros((NUM_EXPERTS, 2), np.bool_)
        fetch[[e for e in tokens if e not in self.residents], 0] = True
        self.transfers.now_s = planned_s
        self.strategy.begin(0, fetch, executed(tokens))
        self.transfers.now_s = start_s
        stats = self.strategy.run(self.compute)
        end_s = self.transfers.now_s
        self.strategy.finish()
        return Done.of(stats, end_s)

    def compute(self, wave: Wave) -> None:
        """Take one second per token."""
        self.transfers.compute(float(sum(wave.num_tokens)))


@dataclass(frozen=True)
class Done:
    """What became of a layer."""

    end_s: float
    fetch_wait_s: float = 0.0
    restore_wait_s: float = 0.0
    fetch_s: float = 0.0
    restore_s: float = 0.0
    num_host_fetches: int = 0
    num_peer_fetches: int = 0
    num_restores: int = 0

    @classmethod
    def of(cls, stats: FetchStats, end_s: float) -> Done:
        """Add up; all copies must be complete."""
        return cls(
            end_s,
            sum(map(span_s, stats.fetch_waits)),
            sum(map(span_s, stats.restore_waits)),
            sum(span_s(t.span) for t in stats.fetches if t.span is not None),
            sum(span_s(t.span) for t in stats.restores if t.span is not None),
            stats.num_host_fetches,
            stats.num_peer_fetches,
            len(stats.restores),
        )


def test_residents_alone_take_their_computation() -> None:
    assert Rank([0, 1]).run({0: 3, 1: 5}) == Done(end_s=9.0)


def test_a_fetch_hides_behind_residents_and_a_restore_behind_what_follows() -> None:
    # Slot 1's resident has no tokens, so expert 7 is copied from 0 to 4 while expert 0 runs from 1 to 4.
    rank = Rank([0, 1])
    done = rank.run({0: 3, 7: 2})
    assert done == Done(end_s=6.0, fetch_s=4.0, restore_s=4.0, num_host_fetches=1, num_restores=1)
    assert rank.transfers.free_s == 10.0  # the restore of expert 1 begins when the layer's computation ends


def test_a_fetch_that_comes_late_is_waited_for() -> None:
    # Expert 0 runs from 1 to 2; expert 7 arrives at 4.
    done = Rank([0, 1]).run({0: 1, 7: 2})
    assert done == Done(end_s=6.0, fetch_wait_s=2.0, fetch_s=4.0, restore_s=4.0, num_host_fetches=1, num_restores=1)


def test_a_copying_processor_computes_later_unless_it_would_have_waited_anyway() -> None:
    # Half of the fetch's 4 s are taken from expert 0; what follows the layer waits for half of the restore.
    rank = Rank([0, 1], share=0.5)
    done = rank.run({0: 3, 7: 2})
    assert (done.end_s, done.fetch_wait_s, rank.transfers.restoring_s) == (1 + 3 + 2 + 2, 0.0, 2.0)
    # With nothing to compute until 4, copying takes nothing from the computation.
    done = Rank([0, 1], share=0.5).run({7: 2})
    assert (done.end_s, done.fetch_wait_s) == (4 + 2, 3.0)
    # Blocking fetches are waited for in full.
    rank = Rank([0, 1], fetch="sync", share=0.5)
    assert rank.run({0: 3, 7: 2}).end_s == 1 + 3 + 4 + 2 + 4
    assert (rank.transfers.owed_s, rank.transfers.restoring_s) == (0.0, 0.0)


def test_two_fetches_with_one_slot_are_a_chain() -> None:
    # Resident 0 runs 1-3, its slot takes 7 from 3 to 7, 7 runs 7-9, the slot takes 8 from 9 to 13, 8 runs 13-14.
    done = Rank([0]).run({0: 2, 7: 2, 8: 1})
    assert done == Done(end_s=14.0, fetch_wait_s=8.0, fetch_s=8.0, restore_s=4.0, num_host_fetches=2, num_restores=1)


def test_blocking_fetches_and_restores_add_up() -> None:
    done = Rank([0, 1], fetch="sync").run({0: 3, 7: 2})
    assert done == Done(
        end_s=1 + 3 + 4 + 2 + 4,
        fetch_wait_s=4.0,
        restore_wait_s=4.0,
        fetch_s=4.0,
        restore_s=4.0,
        num_host_fetches=1,
        num_restores=1,
    )


def test_a_fetch_overtakes_restores_but_not_a_copy_that_runs() -> None:
    transfers, experts = VirtualTransfers(), random_experts(3, 0)
    transfers.copy_s = 4.0
    slots = LayerSlots(experts, META).reserve(3)
    restores = [transfers.submit(CopyRequest(slots[e], e, {}, urgent=False)) for e in (0, 1)]
    transfers.now_s, transfers.copy_s = 1.0, 2.0
    fetch = transfers.submit(CopyRequest(slots[2], 2, {}))
    assert fetch.span == (4.0, 6.0)
    transfers.drain()
    assert [restore.span for restore in restores] == [(0.0, 4.0), (6.0, 10.0)]
    assert transfers.free_s == 10.0


def test_a_restore_that_is_waited_for_is_executed() -> None:
    transfers = VirtualTransfers()
    transfers.copy_s = 4.0
    first, second = LayerSlots(random_experts(2, 0), META).reserve(2)
    for expert_id, slot in enumerate((first, second)):
        transfers.submit(CopyRequest(slot, expert_id, {}, urgent=False))
    assert transfers.wait(second) == (0.0, 8.0), "it is behind the other one"
    assert transfers.wait(first) is None
    assert transfers.now_s == 8.0


def test_weights_from_a_peer_do_not_use_the_host_link() -> None:
    rank = Rank([0, 1], fetch="peer", order="covered")
    rank.comm.arrival_s, rank.transfers.copy_s = 3.5, 100.0
    fetch = np.zeros((NUM_EXPERTS, 2), np.bool_)
    fetch[7, 0] = True
    rank.transfers.now_s = 0.5
    rank.strategy.begin(0, fetch, executed({0: 1, 7: 2}))
    rank.transfers.now_s = 1.0
    stats = rank.strategy.run(rank.compute)
    done = Done.of(stats, rank.transfers.now_s)
    assert (done.end_s, done.fetch_wait_s, done.fetch_s) == pytest.approx((5.5, 1.5, 3.0))
    assert (done.num_host_fetches, done.num_peer_fetches) == (0, 1)
    assert rank.transfers.free_s == 0.0


@pytest.mark.parametrize(("copy_s", "end_s"), [(4.0, 5.5), (8.0, 6.5)])
def test_half_the_weights_from_a_peer_take_half_a_copy_of_the_link(copy_s: float, end_s: float) -> None:
    rank = Rank([0, 1], fetch="peer", order="covered")
    rank.comm.arrival_s, rank.transfers.copy_s = 3.5, copy_s
    fetch = np.zeros((NUM_EXPERTS, 2), np.bool_)
    fetch[7, 0] = True
    rank.transfers.now_s = 0.5
    rank.strategy.begin(0, fetch, executed({0: 1, 7: 2}), halved=fetch)
    rank.transfers.now_s = 1.0
    stats = rank.strategy.run(rank.compute)
    done = Done.of(stats, rank.transfers.now_s)
    assert (done.end_s, done.fetch_s) == pytest.approx((end_s, end_s - 2.0 - 0.5)), "the later of both halves"
    assert (stats.num_host_fetches, stats.num_peer_fetches, stats.num_halved_fetches) == (0, 1, 1)
    assert rank.transfers.free_s == 0.5 + copy_s / 2


@pytest.mark.parametrize(("fetch", "start_s"), [("async", 1.0), ("sync", 3.0)])
def test_a_resident_that_is_being_replaced_is_waited_for(fetch: str, start_s: float) -> None:
    rank = Rank([1], fetch=fetch, order="covered")
    rank.transfers.copy_s = 3.0
    resident: BoolArray = np.arange(NUM_EXPERTS)[:, None] == [0]
    rank.strategy.replace_residents(0, Placement(np.zeros(NUM_EXPERTS, np.int64), resident))
    assert rank.transfers.now_s == (3.0 if fetch == "sync" else 0.0), "blocking copies are waited for at once"
    rank.residents = [0]
    done = rank.run({0: 1}, start_s=start_s)
    wait_s = 2.0 if fetch == "async" else 3.0
    assert done == Done(end_s=4.0, fetch_wait_s=wait_s, fetch_s=3.0, num_host_fetches=1)


class NotedVirtual(VirtualTransfers):
    """Notes what is submitted."""

    def __init__(self) -> None:
        super().__init__()
        self.copy_s = COPY_S
        self.noted: list[tuple[int, bool]] = []

    def submit(self, request: CopyRequest) -> Transfer:
        self.noted.append((request.expert_id, request.urgent))
        return super().submit(request)


class NotedThread(ThreadTransfers):
    """Notes what is submitted."""

    def __init__(self) -> None:
        super().__init__(Hardware())
        self.noted: list[tuple[int, bool]] = []

    def submit(self, request: CopyRequest) -> Transfer:
        self.noted.append((request.expert_id, request.urgent))
        return super().submit(request)


@pytest.mark.parametrize("fetch", ["async", "sync"])
@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("grouped", [False, True])
def test_threads_and_the_virtual_clock_execute_and_copy_in_the_same_order(
    fetch: str, num_slots: int, grouped: bool
) -> None:
    rng = random.Random(num_slots)
    places = [Placement(np.zeros(NUM_EXPERTS, np.int64), (np.arange(NUM_EXPERTS) < n)[:, None]) for n in (2, 4)]
    policy = StaticEP(fetch=fetch, num_slots=num_slots)
    threads, virtual = NotedThread(), NotedVirtual()
    layers = [random_experts(NUM_EXPERTS, 0)] * 2
    strategies = [
        make_fetcher(policy, places, start(layers, transfers=transfers, cost=COST).memory)
        for transfers in (threads, virtual)
    ]
    for strategy in strategies:
        strategy.prepare()
    for layer in (0, 1, 0, 1):
        counts = executed(*({rng.randrange(NUM_EXPERTS): rng.randrange(1, 9)} for _ in range(12)))
        waves: list[list[Wave]] = []
        for strategy in strategies:
            waves.append([])
            strategy.begin(layer, np.zeros((NUM_EXPERTS, 1), np.bool_), counts, grouped=grouped)
            strategy.run(waves[-1].append)
        assert waves[0] == waves[1]
        assert sum(sum(wave.num_tokens) for wave in waves[0]) == counts.sum()
    assert threads.noted == virtual.noted
    assert any(not urgent for _, urgent in virtual.noted)
    threads.close()
