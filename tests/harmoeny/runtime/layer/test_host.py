"""Slices that a rank's host executes: exact beside any fetches, in the device's own bits, and counted."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from harmoeny.choices import Fetch, Knowledge
from harmoeny.hardware import Hardware
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.runtime.layer.engine import ExpertParallel
from harmoeny.runtime.memory.experts import LayerExperts, mlp
from harmoeny.runtime.memory.host import Host, HostStats, ThreadHost
from harmoeny.runtime.memory.waves import HostSlice
from tests.harmoeny.runtime.cases import (
    CPU,
    TOLERANCE,
    RandomPlan,
    expected_output,
    random_experts,
    random_tokens,
    start,
)
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads
from tests.strategies import examples

EMULATED = Hardware(host_link="emulated", host_link_bytes_per_s=1e9, host_link_latency_s=1e-4)


class RandomPlaces(RandomPlan):
    """Ranks hold some of their experts, execute any on their hosts, and keep others from batch to batch."""

    name: ClassVar[str] = "random_places"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.HISTORY, Knowledge.EXACT})
    needs_host = True
    caches = True

    def place(self, layer: int, num_experts: int, world_size: int) -> Placement:
        return self._thinned(super().place(layer, num_experts, world_size), layer)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        plan = super().plan(counts, placement)
        executed = plan.executed() > 0
        rng = np.random.default_rng([self.seed, *plan.tokens.reshape(-1).tolist()])
        host = executed & (rng.random(executed.shape) < 0.5)
        at_home = placement.home[:, None] == np.arange(len(counts))
        from_peer = (plan.fetch if plan.from_peer is None else plan.from_peer) & ~at_home
        halved = None if plan.halved is None else plan.halved & from_peer & ~host
        plan = replace(plan, host=host, fetch=plan.fetch & ~host, from_peer=from_peer, senders=None, halved=halved)
        plan.validate(counts, placement, exact=not self.drop)
        return plan

    def retain(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:
        full = super().place(layer, placement.num_experts, placement.world_size)
        return self._thinned(full, len(history)) if len(history) % 3 else None

    def _thinned(self, placement: Placement, seed: int) -> Placement:
        kept = np.random.default_rng([self.seed, seed]).random(placement.resident.shape) < 0.6
        resident = placement.resident & kept
        return Placement(placement.home, resident & (np.cumsum(resident, axis=0) <= (self.num_slots or 1)))


class SlowHost(ThreadHost):
    """Takes its time now and then, as another core that is busy would."""

    def _execute(self, experts: LayerExperts, slices: Sequence[HostSlice], rows: Tensor, out: Tensor) -> Any:
        time.sleep(0.002 * (len(slices) % 3))
        return super()._execute(experts, slices, rows, out)


def with_host(engine: ExpertParallel, host: Host) -> ExpertParallel:
    engine.memory = replace(engine.memory, host=host)
    return engine


@examples(80)
@given(data=st.data())
def test_any_slice_on_the_host_is_exact(data: st.DataObject) -> None:
    world_size, num_experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    fetch = data.draw(st.sampled_from([f for f in Fetch if f != "none"]))
    slots, seed = data.draw(st.integers(1, num_experts)), data.draw(st.integers(0, 10**6))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    hardware = data.draw(st.sampled_from([Hardware(), EMULATED]))
    kernel = "loop" if hardware is EMULATED else data.draw(st.sampled_from(["loop", "grouped_mm"]))
    top_k = data.draw(st.integers(1, min(3, num_experts)))
    counts = [[data.draw(st.sampled_from([0, 1, 5, 16])) for _ in range(world_size)] for _ in range(2)]
    layers = [random_experts(num_experts, seed=layer, width=16, dtype=dtype) for layer in range(2)]
    policy = RandomPlaces(seed, drop=data.draw(st.booleans()), fetch=fetch, num_slots=slots)

    def rank_main(comm: ThreadCommunicator) -> None:
        host = SlowHost(hardware, 1)
        engine = with_host(start(layers, comm, hardware=hardware, kernel=kernel), host)
        system = engine.build_system("x", policy)
        engine.use(system)
        for batch in range(4):
            for layer, of_ranks in enumerate(counts):
                t = random_tokens(seed + batch + 7 * layer + 100 * comm.rank, of_ranks[comm.rank], num_experts, top_k,
                                  dtype=dtype, masked=0.1)  # fmt: skip
                engine.recorder.begin_layer(layer)
                with engine.executed_masks() as masks:
                    output = engine.forward(layer, t.hidden, t.ids, t.weights)
                expected = expected_output(layers[layer], t.hidden, t.ids, t.weights, masks[0])
                if output.numel():
                    error = (output.double() - expected).abs().max() / expected.abs().max().clamp(min=1)
                    assert error <= TOLERANCE[dtype]
        engine.finish()
        for times in engine.recorder.collect():
            marks, rank = times.marks, comm.rank
            assert marks.plan is not None
            assert marks.plan.host is not None
            on_host = marks.plan.executed()[marks.plan.host[:, rank], rank].sum()
            assert marks.host.num_tokens == on_host
            assert marks.host.activation_bytes == 2 * on_host * 8 * dtype.itemsize
            assert (times.host_s > 0) == (on_host > 0)
        host.close()
        engine.close()

    run_threads(world_size, rank_main)


class AllHere(RandomPlan):
    """One rank executes everything from its slots, or everything on its host."""

    needs_host = True

    def __init__(self, *, host: bool) -> None:
        super().__init__(0)
        self.on_host = host

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        plan = super().plan(counts, placement)
        return replace(plan, host=(plan.executed() > 0) & self.on_host)


@pytest.mark.parametrize("hardware", [Hardware(), EMULATED])
@pytest.mark.parametrize("gated", [False, True])
def test_the_host_gives_the_devices_own_bits(hardware: Hardware, gated: bool) -> None:
    layers = [random_experts(6, 3, hidden_size=48, width=80, gated=gated)]
    tokens = random_tokens(5, 64, 6, 2, hidden_size=48)
    outputs = []
    for host in (False, True):
        engine = start(layers, hardware=hardware, host_threads=1)
        engine.use(engine.build_system("x", AllHere(host=host)))
        engine.recorder.begin_layer(0)
        outputs.append(engine.forward(0, tokens.hidden, tokens.ids, tokens.weights))
        assert engine.recorder.collect()[0].marks.host.num_tokens == (128 if host else 0)
        engine.close()
    assert torch.equal(*outputs)


def test_the_device_goes_on_meanwhile_and_waits_for_what_is_late() -> None:
    """Both must be at work at once; then the host takes 60 ms longer, which are waited for."""
    device, at_once, device_ended = threading.current_thread(), threading.Barrier(2), threading.Event()

    def function(weights: Any, rows: Tensor, out: Tensor) -> None:
        here = threading.current_thread()
        if not device_ended.is_set():
            at_once.wait(60)
        mlp(torch.relu)(weights, rows, out)
        if here is device:
            device_ended.set()
        else:
            assert device_ended.wait(60)
            time.sleep(0.03)

    layers = [replace(random_experts(4, 0), function=function)]
    tokens = random_tokens(1, 40, 4, 2)
    tokens.ids[:] = torch.tensor([[0, 1], [2, 3]]).repeat(20, 1)

    class Half(AllHere):
        def plan(self, counts: IntArray, placement: Placement) -> Plan:
            plan = super().plan(counts, placement)
            return replace(plan, host=np.array([[True], [True], [True], [False]]))

    engine = start(layers, hardware=EMULATED, host_threads=1)
    engine.use(engine.build_system("x", Half(host=True)))
    engine.recorder.begin_layer(0)
    engine.forward(0, tokens.hidden, tokens.ids, tokens.weights)
    (times,) = engine.recorder.collect()
    assert times.host_s >= 0.09
    assert times.host_wait_s > 0.02
    engine.close()


def test_what_fails_on_the_host_fails_the_layer() -> None:
    def broken(*_: object) -> None:
        raise MemoryError("no room")

    engine = start([replace(random_experts(4, 0), function=broken)], host_threads=1)
    engine.use(engine.build_system("x", AllHere(host=True)))
    tokens = random_tokens(1, 8, 4, 2)
    engine.recorder.begin_layer(0)
    with pytest.raises(MemoryError, match="no room"):
        engine.forward(0, tokens.hidden, tokens.ids, tokens.weights)
    engine.close()


def test_a_policy_that_needs_a_host_is_refused_without_one() -> None:
    engine = start([random_experts(4, 0)])
    with pytest.raises(ValueError, match="host_threads: 0, must be at least 1 for x"):
        engine.build_system("x", AllHere(host=True))
    engine.close()


def test_calibration_measures_device_and_host_at_once() -> None:
    """A slice that sleeps for 3 ms, and 40 us per row where that is longer, over a link of 0.1 ms each way."""

    def function(_: Any, rows: Tensor, out: Tensor) -> None:
        time.sleep(max(0.003, 4e-5 * len(rows)))
        out.zero_()

    layers = [replace(random_experts(4, 0), function=function)]
    cost = start(layers, hardware=EMULATED, cost=None, host_threads=1).memory.cost
    for token_s, launch_s, weights_s in (
        (cost.token_s, cost.launch_s, cost.weights_s),
        (cost.host_token_s, cost.host_launch_s, cost.host_weights_s),
    ):
        assert 3.6e-5 <= token_s < 2e-4
        assert 0.003 <= launch_s + weights_s < 0.03
    assert 2e-4 <= cost.host_trip_s < 0.05
    assert start(layers, hardware=EMULATED, cost=None).memory.cost.host_token_s == 0.0


def test_stats_of_a_host_begin_anew_with_every_layer() -> None:
    host = ThreadHost(Hardware(), 1)
    experts, rows = random_experts(3, 0), torch.randn(5, 8)
    found: list[HostStats] = []
    for _ in range(2):
        host.start(experts, [HostSlice(1, 0, 2), HostSlice(2, 2, 3)], rows, torch.empty_like(rows))
        found.append(host.finish())
    host.close()
    assert [(s.num_tokens, s.activation_bytes, len(s.busy)) for s in found] == [(5, 2 * 5 * 8 * 4, 1)] * 2
    assert rows.device == CPU
