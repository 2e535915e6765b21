"""What the timer of a measured pass includes and what it leaves out, with parts that take a known time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from experiments.measure import clock, decode, rounds, serving
from experiments.measure.batch import Batch
from experiments.measure.clock import ClockError, RankClock
from experiments.measure.goal import Goal
from experiments.measure.turns import collector_paused, in_turn
from experiments.measure.yardstick import Taken
from experiments.results.layer_rows import RankIteration
from harmoeny.runtime.exchange.comm import Communicator
from results_schema.paired import mirrored_pairs
from tests.ranks import run_ranks

#: Nothing else takes nearly as long. Nobody sleeps: the clock goes forward.
PART_S = 1000.0


class FakeBench:
    """A bench that notes what happens in which order; ``slow`` is the part that takes :data:`PART_S`."""

    def __init__(self, slow: str, warmup_rounds: int = 0, num_rounds: int = 1) -> None:
        self.slow, self.events, self.passed_s = slow, [], 0.0  # type: tuple[str, list[str], float]
        self.rig, self.clock_offset_s = self, 0.0
        empty = torch.zeros((2, 4), dtype=torch.int64)
        self.batches, self.warm_up = [Batch(empty, []) for _ in range(num_rounds)], Batch(empty, [])
        self.systems: list[Any] = [SimpleNamespace(name=name) for name in ("a", "b")]
        self.comm = SimpleNamespace(barrier=self.part("barrier"), rank=0, world_size=1, device=torch.device("cpu"))
        options = SimpleNamespace(warmup_rounds=warmup_rounds, rounds=num_rounds, until=None)
        self.point = SimpleNamespace(options=options, most_rounds=num_rounds)
        self.batch = lambda index: self.warm_up if index < 0 else self.batches[index]
        self.progress = SimpleNamespace(say=lambda _: None, advance=lambda: None)
        recorder = SimpleNamespace(begin_iteration=lambda: None, collect=list)
        self.engine = SimpleNamespace(use=self.part("use"), finish=self.part("finish"), recorder=recorder)
        tape = SimpleNamespace(pin=lambda *_: None)
        self.model = SimpleNamespace(forward=self.part("forward"), context=SimpleNamespace(tape=tape))
        self.begin_loop, self.begin_round = self.part("reset"), self.part("clock")
        self.yardstick = SimpleNamespace(measure=lambda: self.part("yardstick")() or Taken(0.01, 0.01))
        self.synchronize = self.part("synchronize")

    def part(self, name: str) -> Callable[..., None]:
        def run(*_: object) -> None:
            self.events.append(name)
            if name == self.slow:
                self.passed_s += PART_S

        return run


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    def made(slow: str, **sizes: int) -> Any:
        fake = FakeBench(slow, **sizes)
        real = time.perf_counter
        monkeypatch.setattr(time, "perf_counter", lambda: real() + fake.passed_s)
        device = SimpleNamespace(synchronize_compute=fake.synchronize)
        monkeypatch.setattr("experiments.measure.rounds.Device.of", lambda _: device)
        return fake

    return made


def _run_rounds(fake: Any) -> list[RankIteration]:
    """Measure a point that is alone."""
    (records,) = rounds.run_rounds(fake, [fake], Goal(fake, [fake]))
    return records.iterations


@pytest.mark.parametrize(
    ("slow", "in_latency", "in_drain"),
    [
        ("use", False, False),  # bringing the slots to the residents
        ("barrier", False, False),  # waiting for the other ranks
        ("forward", True, False),
        ("synchronize", True, False),  # what the device still computes
        ("finish", False, True),  # copies that the pass left behind
        ("yardstick", False, False),
    ],
)
def test_what_the_timer_includes(bench: Callable[..., Any], slow: str, in_latency: bool, in_drain: bool) -> None:
    first, second = _run_rounds(bench(slow))
    for record in (first, second):
        assert (record.end_s - record.start_s >= PART_S) == in_latency
        assert (record.drain_s >= PART_S) == in_drain


def test_the_order_of_a_measured_pass(bench: Callable[..., Any]) -> None:
    fake = bench("")
    _run_rounds(fake)
    one = ["use", "barrier", "forward", "synchronize", "finish"]
    assert fake.events == ["reset", "clock", "yardstick", *one, *one, "yardstick"]


def test_clocks_are_compared_before_every_round_and_systems_forget_before_the_first(bench: Callable[..., Any]) -> None:
    fake = bench("", warmup_rounds=2, num_rounds=3)
    assert len(_run_rounds(fake)) == 3 * 2, "warm-up rounds are thrown away"
    found = [event for event in fake.events if event in ("reset", "clock")]
    assert found == ["clock", "clock", "reset", "clock", "clock", "clock"]
    assert fake.events.index("reset") < len(fake.events) - fake.events[::-1].index("clock")


def test_times_are_on_the_clock_of_rank_0(bench: Callable[..., Any]) -> None:
    fake = bench("forward")
    fake.clock_offset_s = 1000.0
    before = time.perf_counter()
    record = _run_rounds(fake)[0]
    assert before + 1000 <= record.start_s < record.end_s <= time.perf_counter() + 1000


def test_every_second_round_goes_the_other_way_and_everyone_takes_every_turn() -> None:
    orders = [in_turn("abcd", round_index, 401) for round_index in range(401)]
    assert all(sorted(order) == list("abcd") for order in orders)
    for one, other in mirrored_pairs(401):
        assert orders[one] == orders[other][::-1]
    firsts = Counter(order[0] for order in orders)
    assert min(firsts[name] for name in "abcd") > 0.7 * len(orders) / 4, "a new order for every two rounds"
    assert orders[7] == in_turn("abcd", 7, 9), "the same on all ranks"


@pytest.mark.parametrize("num_rounds", [1, 2, 3])
def test_few_rounds_take_turns_too(num_rounds: int) -> None:
    orders = [in_turn("abcd", round_index, num_rounds) for round_index in range(-2, num_rounds)]
    assert all(sorted(order) == list("abcd") for order in orders)
    measured = orders[2:]
    assert all(measured[one] == measured[other][::-1] for one, other in mirrored_pairs(num_rounds))


def test_the_garbage_collector_runs_before_and_not_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    for name in ("collect", "disable", "enable"):
        monkeypatch.setattr(f"gc.{name}", lambda name=name: events.append(name))
    with collector_paused():
        events.append("inside")
    assert events == ["collect", "disable", "inside", "enable"]


@pytest.mark.parametrize("loop", [serving.serve_rounds, decode.decode_rounds], ids=["open loop", "decode"])
def test_systems_forget_before_the_other_loops_too(bench: Callable[..., Any], loop: Callable[..., Any]) -> None:
    fake = bench("")
    fake.batches = []
    loop(fake, [])
    assert fake.events == ["reset"]


AHEAD_S = 1234.5


def _offset(rank: int) -> float:
    """Measure on ranks of two hosts, the second of which started its clock AHEAD_S earlier."""
    real = time.perf_counter
    ahead = SimpleNamespace(
        perf_counter=lambda: real() + rank * AHEAD_S,
        clock_gettime=time.clock_gettime,
        CLOCK_MONOTONIC_RAW=time.CLOCK_MONOTONIC_RAW,
    )
    with mock.patch.object(clock, "_boot_id", return_value=f"host {rank}"), mock.patch.object(clock, "time", ahead):
        return RankClock(Communicator(torch.device("cpu"))).offset_s()


def _jumps(seconds: float, monkeypatch: pytest.MonkeyPatch) -> RankClock:
    watched, real = RankClock(Communicator(torch.device("cpu"))), time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + seconds)
    return watched


@pytest.mark.parametrize("jump_s", [-86400.0, -0.5, 0.5, 86400.0])
def test_a_clock_that_jumps_is_refused(jump_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClockError, match=rf"clock jumped by {jump_s:.0f}|clock jumped by -?0\.[45]"):
        _jumps(jump_s, monkeypatch).check()


def test_a_clock_that_goes_on_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = _jumps(0.0, monkeypatch)
    time.sleep(0.05)
    watched.check()


@pytest.mark.ranks
def test_the_offset_takes_a_clock_to_that_of_rank_0(tmp_path: Path) -> None:
    here, there = run_ranks(2, _offset, tmp_path)
    assert here == 0.0
    assert there == pytest.approx(-AHEAD_S, abs=0.05)
