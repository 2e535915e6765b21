"""Replays one rank's schedule of a layer against its copy engine, in the order in which the real runtime works."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from harmoeny.runtime.memory.schedule import ExpertWork, Schedule, Step


@dataclass
class CopyEngine:
    """What brings weights to one rank: one load at a time, fetches before restores that have not begun.

    Attributes:
        free_s: when the present load ends.
        later: restores that wait, as (time from which they could begin, duration).
    """

    free_s: float = 0.0
    later: deque[tuple[float, float]] = field(default_factory=deque)

    def load(self, now_s: float, duration_s: float) -> tuple[float, float]:
        """Queue a fetch at ``now_s`` and return its begin and end."""
        while self.later and max(self.free_s, self.later[0][0]) < now_s:
            self._restore()
        begin_s = max(self.free_s, now_s)
        self.free_s = begin_s + duration_s
        return begin_s, self.free_s

    def restore_later(self, now_s: float, duration_s: float) -> None:
        """Queue a restore, which every later fetch may overtake."""
        self.later.append((now_s, duration_s))

    def drain(self) -> float:
        """Execute all restores and return when the last one is complete."""
        while self.later:
            self._restore()
        return self.free_s

    def _restore(self) -> None:
        available_s, duration_s = self.later.popleft()
        self.free_s = max(self.free_s, available_s) + duration_s


@dataclass
class Replayed:
    """What became of a rank's schedule.

    Attributes:
        end_s: when its computation ends.
        fetch_wait_s: how long it stood still for fetches, or for residents that are being replaced.
        restore_wait_s: how long it stood still for restores.
        fetch_s: how long its fetches took, added up.
        restore_s: how long its restores take, added up.
        restoring_s: how long the processor is kept from what follows the computation, by the restores.
        num_host_fetches: loads of experts that it executed, from host memory.
        num_peer_fetches: likewise from another rank.
        num_restores: loads of residents afterwards.
    """

    end_s: float
    fetch_wait_s: float = 0.0
    restore_wait_s: float = 0.0
    fetch_s: float = 0.0
    restore_s: float = 0.0
    restoring_s: float = 0.0
    num_host_fetches: int = 0
    num_peer_fetches: int = 0
    num_restores: int = 0


@dataclass(frozen=True)
class Sources:
    """How long weights take to come.

    Attributes:
        host_s: one expert from host memory.
        load_share: share of that time that a load beside the computation takes from it.
        arrivals_s: by expert, when the weights that a peer sends are there.
    """

    host_s: float
    load_share: float = 0.0
    arrivals_s: Mapping[int, float] = field(default_factory=dict)


def replay(
    schedule: Schedule,
    copies: CopyEngine,
    sources: Sources,
    expert_s: Callable[[ExpertWork], float],
    *,
    ahead: bool,
    planned_s: float,
    start_s: float,
    slot_ready_s: Mapping[int, float],
) -> Replayed:
    """Execute a schedule as :meth:`harmoeny.runtime.memory.fetch.base.FetchStrategy.run` does.

    Args:
        schedule: steps and restores.
        copies: the rank's copy engine; updated.
        sources: how long loads take.
        expert_s: how long a step computes.
        ahead: loads begin when their slot is free and not when their expert is next.
        planned_s: when the plan is known, so that loads may begin.
        start_s: when computation may begin.
        slot_ready_s: slots that are being loaded already, and when that ends.
    """
    loaded_s: dict[int, float] = {}
    done = Replayed(end_s=start_s)
    next_load = 0
    owed_s = 0.0

    def fetch(index: int, step: Step, now_s: float) -> None:
        nonlocal owed_s
        arrival_s = sources.arrivals_s.get(step.work.expert_id)
        if arrival_s is None:
            begin_s, end_s = copies.load(now_s, sources.host_s)
            done.num_host_fetches += 1
            if ahead:
                owed_s += sources.load_share * sources.host_s
        else:
            begin_s, end_s = now_s, max(now_s, arrival_s)
            done.num_peer_fetches += 1
        loaded_s[index] = end_s
        done.fetch_s += end_s - begin_s

    def load_ahead(finished_step: int, now_s: float) -> None:
        nonlocal next_load
        while next_load < len(schedule.steps):
            step = schedule.steps[next_load]
            if step.load and step.after > finished_step:
                return
            if step.load:
                fetch(next_load, step, now_s)
            next_load += 1

    if ahead:
        load_ahead(-1, planned_s)
    for index, step in enumerate(schedule.steps):
        if step.load and not ahead:
            fetch(index, step, done.end_s)
        ready_s = loaded_s.get(index, 0.0) if step.load else slot_ready_s.get(step.slot, 0.0)
        if ready_s > done.end_s:
            done.fetch_wait_s += ready_s - done.end_s
            owed_s = max(0.0, owed_s - (ready_s - done.end_s))  # while it waited the processor was free to copy
            done.end_s = ready_s
        done.end_s += expert_s(step.work) + owed_s
        owed_s = 0.0
        if ahead:
            load_ahead(index, done.end_s)
    for _ in schedule.restores:
        done.num_restores += 1
        done.restore_s += sources.host_s
        if ahead:
            copies.restore_later(done.end_s, sources.host_s)
            done.restoring_s += sources.load_share * sources.host_s
        else:
            _, end_s = copies.load(done.end_s, sources.host_s)
            done.restore_wait_s += end_s - done.end_s
            done.end_s = end_s
    return done
