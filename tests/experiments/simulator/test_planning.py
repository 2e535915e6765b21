from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest

from baselines.static_ep import StaticEP
from experiments.simulator import flows, planning
from experiments.simulator.planning import PlanTimer
from harmoeny.choices import Knowledge
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan


@dataclass
class Clock:
    """Stands still but where somebody advances it."""

    now_s: float = 0.0

    def perf_counter(self) -> float:
        return self.now_s


@dataclass(kw_only=True)
class Slow(StaticEP):
    """Plans in ``base_s`` and ``entry_s`` per entry of its plans, ten times as long at first."""

    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT})

    base_s: float = 1e-4
    entry_s: float = 1e-7
    clock: Clock = field(default_factory=Clock)
    sizes: list[int] = field(default_factory=list)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        plan = super().plan(counts, placement)
        slow = 1 if self.sizes else 10
        self.sizes.append(len(counts))
        self.clock.now_s += slow * (self.base_s + self.entry_s * plan.tokens.size)
        return plan


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(planning, "time", clock)
    return clock


def seconds(policy: Slow, timer: PlanTimer, world_size: int, num_experts: int = 4) -> float:
    counts = np.ones((world_size, num_experts), np.int64)
    return timer.seconds(0, counts, policy.place(0, num_experts, world_size))


def test_a_plans_time_is_the_median_of_a_few_without_the_first(clock: Clock) -> None:
    policy = Slow(clock=clock)
    timer = PlanTimer(policy)
    assert seconds(policy, timer, 8) == pytest.approx(1e-4 + 1e-7 * 8 * 4 * 8)
    assert policy.sizes == [8] * 6
    seconds(policy, timer, 8)
    assert len(policy.sizes) == 11, "only the very first plan compiles"


def test_slow_plans_are_not_repeated(clock: Clock) -> None:
    policy = Slow(clock=clock, base_s=1.0)
    timer = PlanTimer(policy)
    seconds(policy, timer, 2)
    assert len(policy.sizes) == 2


@pytest.mark.parametrize("world_size", [64, 62, 17])
def test_plans_without_room_are_extrapolated_and_never_made(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, world_size: int
) -> None:
    monkeypatch.setattr(flows, "_LARGEST_PLAN_BYTES", 16 * 4 * 16 * 8)
    policy = Slow(clock=clock)
    timer = PlanTimer(policy)
    assert seconds(policy, timer, world_size) == pytest.approx(1e-4 + 1e-7 * world_size * 4 * world_size)
    assert max(policy.sizes) <= 16
    num_plans = len(policy.sizes)
    seconds(policy, timer, world_size)
    assert len(policy.sizes) == num_plans, "measured once"
