"""Orders a rank's work where it includes fetches, by predicting when they and the slices end."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import numpy as np

from harmoeny.choices import WorkOrder
from harmoeny.cost import ExpertCost
from harmoeny.runtime.memory.residents import EMPTY, settled
from harmoeny.runtime.memory.waves import Schedule, ScheduledFetch

#: No slot, slice or wave.
NONE = -1
#: Residents that are executed before the first fetched expert in the paper's order.
PAPER_LEAD = 2


class Slice(NamedTuple):
    """Rows of one expert that arrive at one stage, and where they begin if they lie by stage and expert."""

    stage: int
    expert_id: int
    num_tokens: int
    start: int


class Predicted(NamedTuple):
    """What is known beforehand of when a rank can begin what.

    Attributes:
        cost: predicts how long fetches and slices take.
        arrivals: seconds from when fetches can begin until weights from peers are there, by expert.
        halved: those of them of which half comes from the host.
        head_s: how much sooner fetches can begin than slices.
        rest_s: how much later the rows of stages behind the first are there than its own.
    """

    cost: ExpertCost
    arrivals: Mapping[int, float]
    halved: Set[int]
    head_s: float
    rest_s: float

    def from_host(self, expert_id: int) -> float:
        """Return how much of an expert comes from the host: 0, a half or 1."""
        if expert_id not in self.arrivals:
            return 1.0
        return 0.5 if expert_id in self.halved else 0.0


def draft_schedule(
    parts: Sequence[Slice], home: Sequence[int], times: Predicted, *, work_order: str, wanted: Set[int] | None = None
) -> Schedule:
    """Return the schedule of slices, one after the other, whose experts are not all residents.

    Args:
        parts: the slices by priority.
        home: as for :func:`harmoeny.runtime.memory.schedule.make_schedule`, and so the rest.
        times: predicts when fetches and slices begin and end.
        work_order: ``covered`` or ``paper``.
        wanted: the residents after the layer; None: those before it.
    """
    slot_of = {expert_id: slot for slot, expert_id in enumerate(home) if expert_id != EMPTY}
    held = [p for p in parts if p.expert_id in slot_of]
    if wanted is not None:  # those that make room come first, so that nothing has to be copied back
        held.sort(key=lambda p: (p.stage, p.expert_id in wanted))
    hits = deque(held)
    misses = deque(p for p in parts if p.expert_id not in slot_of)
    draft = _Draft(home, slot_of, Counter(p.expert_id for p in hits), times, wanted)
    fetch: _Fetch | None = None
    while hits or misses:
        if misses and fetch is None:
            fetch = draft.next_fetch(misses[0].expert_id)
        if fetch is None or (hits and draft.resident_first(hits[0], misses[0], fetch, work_order)):
            draft.add_resident(hits.popleft())
        else:
            draft.add_fetched(misses.popleft(), fetch)
            fetch = None
    return draft.schedule()


def closing(
    home: Sequence[int], content: Sequence[int], wanted: Set[int] | None
) -> tuple[list[tuple[int, int]], list[int] | None]:
    """Return the :attr:`Schedule.restores` of a layer, and its :attr:`Schedule.after`.

    Args:
        home: expert in every slot before the layer.
        content: and after its last wave.
        wanted: the residents after the layer; None: those before it.
    """
    if wanted is not None:
        after, copies = settled(content, wanted)
        return copies, after
    slots = enumerate(zip(home, content, strict=True))
    return [(expert_id, slot) for slot, (expert_id, now) in slots if expert_id not in (EMPTY, now)], None


class _Fetch(NamedTuple):
    """The next fetch: its slot, when it and the host's link are predicted to be through, and whether it is needed."""

    slot: int
    ready_s: float
    link_s: float
    needed: bool


class _Drafted(NamedTuple):
    """A slice in its place, with the fetch that it needs and the last slice that uses the slot before that."""

    part: Slice
    slot: int
    fetch: _Fetch | None
    after: int


class _Draft:
    """A schedule while it is being made; times are predicted seconds since the layer's first slice could begin."""

    def __init__(
        self,
        home: Sequence[int],
        slot_of: dict[int, int],
        due: Counter[int],
        times: Predicted,
        wanted: Set[int] | None,
    ) -> None:
        """Start with the slots as they are between batches.

        Args:
            home: expert per slot.
            slot_of: slot per expert; updated.
            due: number of slices per resident that are still to be added; updated.
            times: predicts when fetches and slices begin and end.
            wanted: the residents after the layer; None: those before it.
        """
        self._wanted = wanted
        self._drafted: list[_Drafted] = []
        self._home, self._slot_of, self._due, self._times = home, slot_of, due, times
        self._content = list(home)
        self._last_use = [NONE] * len(home)
        head_s = times.head_s
        self._free_s = [-head_s] * len(home)
        self._compute_s, self._link_s = 0.0, -head_s
        # Two fetches ahead keep the link busy; more would only overwrite more residents.
        self._fetched_ends_s = deque([-head_s, -head_s], maxlen=2)

    def next_fetch(self, expert_id: int) -> _Fetch | None:
        """Choose the slot for an expert; None while residents that still have slices fill all slots."""
        if expert_id in self._slot_of:
            return _Fetch(self._slot_of[expert_id], 0.0, self._link_s, needed=False)
        from_host = self._times.from_host(expert_id)
        earliest_s = max(self._link_s, self._fetched_ends_s[0]) if from_host else self._fetched_ends_s[0]
        choices = [
            (max(earliest_s, self._free_s[slot]), self._stays(content, self._home[slot]), slot)
            for slot, content in enumerate(self._content)
            if not self._due.get(content)
        ]
        if not choices:
            return None
        start_s, _, slot = min(choices)
        copied_s = start_s + from_host * self._times.cost.fetch_s
        arrival_s = self._times.arrivals.get(expert_id, -np.inf)
        link_s = copied_s if from_host else self._link_s
        return _Fetch(slot, max(copied_s, arrival_s - self._times.head_s), link_s, needed=True)

    def _stays(self, content: int, home: int) -> bool:
        """Return whether an expert that lies in a slot, before the layer's ``home``, would be copied there again."""
        return content == home != EMPTY if self._wanted is None else content in self._wanted

    def resident_first(self, resident: Slice, fetched: Slice, fetch: _Fetch, work_order: str) -> bool:
        """Return whether a resident's slice is executed before the one whose expert is fetched next."""
        if work_order == WorkOrder.PAPER:
            return len(self._drafted) < PAPER_LEAD
        return resident.stage < fetched.stage or fetch.ready_s > self._compute_s

    def add_resident(self, part: Slice) -> None:
        """Append a resident's slice."""
        self._due[part.expert_id] -= 1
        self._append(part, self._slot_of[part.expert_id])

    def add_fetched(self, part: Slice, fetch: _Fetch) -> None:
        """Append a slice of an expert that is no resident."""
        slot = fetch.slot
        if fetch.needed:
            self._slot_of.pop(self._content[slot], None)
            self._content[slot], self._slot_of[part.expert_id] = part.expert_id, slot
            self._link_s = fetch.link_s
        self._compute_s = max(self._compute_s, fetch.ready_s)
        self._append(part, slot, fetch if fetch.needed else None)
        self._fetched_ends_s.append(self._compute_s)

    def schedule(self) -> Schedule:
        """Return what was drafted, every slice a wave."""
        drafted = self._drafted
        restores, after = closing(self._home, self._content, self._wanted)
        return Schedule(
            stages=[d.part.stage for d in drafted],
            expert_ids=[d.part.expert_id for d in drafted],
            slots=[d.slot for d in drafted],
            starts=[d.part.start for d in drafted],
            num_tokens=[d.part.num_tokens for d in drafted],
            ends=list(range(1, len(drafted) + 1)),
            fetches=[
                ScheduledFetch(d.part.expert_id, d.slot, number, d.after)
                for number, d in enumerate(drafted)
                if d.fetch is not None
            ],
            restores=restores,
            after=after,
        )

    def _append(self, part: Slice, slot: int, fetch: _Fetch | None = None) -> None:
        begin_s = max(self._compute_s, self._times.rest_s if part.stage > 0 else 0.0)
        self._compute_s = begin_s + part.num_tokens * self._times.cost.token_s
        self._drafted.append(_Drafted(part, slot, fetch, self._last_use[slot]))
        self._last_use[slot] = len(self._drafted) - 1
        self._free_s[slot] = self._compute_s
