"""Orders a rank's work where it includes fetches, by predicting when they and the slices end."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from harmoeny.choices import WorkOrder
from harmoeny.cost import ExpertCost
from harmoeny.runtime.memory.residents import EMPTY
from harmoeny.runtime.memory.waves import Schedule, ScheduledFetch

#: No slot, slice or wave.
NONE = -1
#: Residents that are executed before the first fetched expert in the paper's order.
_PAPER_LEAD = 2


class Slice(NamedTuple):
    """Rows of one expert that arrive at one stage, and where they begin if they lie by stage and expert."""

    stage: int
    expert_id: int
    num_tokens: int
    start: int


def draft_schedule(
    parts: Sequence[Slice], home: Sequence[int], cost: ExpertCost, *, work_order: str, grouped: bool
) -> Schedule:
    """Return the schedule of slices whose experts are not all residents.

    Args:
        parts: the slices by priority.
        home: as for :func:`harmoeny.runtime.memory.schedule.make_schedule`, and so the rest.
        cost: predicts when fetches and slices end.
        work_order: ``covered`` or ``paper``.
        grouped: execute many slices at once.
    """
    slot_of = {expert_id: slot for slot, expert_id in enumerate(home) if expert_id != EMPTY}
    hits = deque(p for p in parts if p.expert_id in slot_of)
    misses = deque(p for p in parts if p.expert_id not in slot_of)
    draft = _Draft(home, slot_of, Counter(p.expert_id for p in hits), cost)
    fetch: _Fetch | None = None
    while hits or misses:
        if misses and fetch is None:
            fetch = draft.next_fetch(misses[0].expert_id)
        if fetch is None or (hits and draft.resident_first(fetch, work_order)):
            draft.add_resident(hits.popleft())
        else:
            draft.add_fetched(misses.popleft(), fetch)
            fetch = None
    return draft.schedule(grouped=grouped)


def _starts(parts: Sequence[Slice]) -> list[int]:
    """Return the first row of every slice where the rows lie by stage, and within a stage in the order of ``parts``."""
    starts, next_row = [0] * len(parts), 0
    for i in sorted(range(len(parts)), key=lambda i: parts[i].stage):
        starts[i] = next_row
        next_row += parts[i].num_tokens
    return starts


class _Fetch(NamedTuple):
    """The next fetch: its slot, when it is predicted to begin and to be complete, and whether it is needed at all."""

    slot: int
    start_s: float
    ready_s: float
    needed: bool


class _Drafted(NamedTuple):
    """A slice in its place, with the fetch that it needs and the last slice that uses the slot before that."""

    part: Slice
    slot: int
    begin_s: float
    end_s: float
    fetch: _Fetch | None
    after: int


class _Draft:
    """A schedule while it is being made; times are predicted seconds since the layer's first slice."""

    def __init__(self, home: Sequence[int], slot_of: dict[int, int], due: Counter[int], cost: ExpertCost) -> None:
        """Start with the slots as they are between batches.

        Args:
            home: expert per slot.
            slot_of: slot per expert; updated.
            due: number of slices per resident that are still to be added; updated.
            cost: predicts times.
        """
        self._drafted: list[_Drafted] = []
        self._home, self._slot_of, self._due, self._cost = home, slot_of, due, cost
        self._content = list(home)
        self._last_use = [NONE] * len(home)
        self._free_s = [0.0] * len(home)
        self._compute_s = self._link_s = 0.0
        # Two fetches ahead keep the link busy; more would only overwrite more residents.
        self._fetched_ends_s = deque([0.0, 0.0], maxlen=2)

    def next_fetch(self, expert_id: int) -> _Fetch | None:
        """Choose the slot for an expert; None while residents that still have slices fill all slots."""
        if expert_id in self._slot_of:
            return _Fetch(self._slot_of[expert_id], 0.0, 0.0, needed=False)
        earliest_s = max(self._link_s, self._fetched_ends_s[0])
        choices = [
            (max(earliest_s, self._free_s[slot]), content == self._home[slot] != EMPTY, slot)
            for slot, content in enumerate(self._content)
            if not self._due.get(content)
        ]
        if not choices:
            return None
        start_s, _, slot = min(choices)
        return _Fetch(slot, start_s, start_s + self._cost.fetch_s, needed=True)

    def resident_first(self, fetch: _Fetch, work_order: str) -> bool:
        """Return whether a resident is executed before the expert that is fetched next."""
        if work_order == WorkOrder.PAPER:
            return len(self._drafted) < _PAPER_LEAD
        return fetch.ready_s > self._compute_s

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
            self._link_s = fetch.ready_s
        self._compute_s = max(self._compute_s, fetch.ready_s)
        self._append(part, slot, fetch if fetch.needed else None)
        self._fetched_ends_s.append(self._compute_s)

    def schedule(self, *, grouped: bool) -> Schedule:
        """Return what was drafted, in waves."""
        drafted = self._drafted
        if grouped:
            ends = self._wave_ends()
            wave_of = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)).tolist()
        else:
            ends, wave_of = list(range(1, len(drafted) + 1)), list(range(len(drafted)))
        fetches = [
            ScheduledFetch(d.part.expert_id, d.slot, wave_of[i], wave_of[d.after] if d.after != NONE else NONE)
            for i, d in enumerate(drafted)
            if d.fetch is not None
        ]
        if grouped:
            order = sorted(range(len(drafted)), key=lambda i: (wave_of[i], drafted[i].slot))
            drafted = [drafted[i] for i in order]
            starts = _starts([d.part for d in drafted])
        else:
            starts = [d.part.start for d in drafted]
        slots = enumerate(zip(self._home, self._content, strict=True))
        return Schedule(
            stages=[d.part.stage for d in drafted],
            expert_ids=[d.part.expert_id for d in drafted],
            slots=[d.slot for d in drafted],
            starts=starts,
            num_tokens=[d.part.num_tokens for d in drafted],
            ends=ends,
            fetches=fetches,
            restores=[(expert_id, slot) for slot, (expert_id, now) in slots if expert_id not in (EMPTY, now)],
        )

    def _wave_ends(self) -> list[int]:
        """Return one behind the last slice of every wave of a grouped schedule."""
        fetching = deque((i, d) for i, d in enumerate(self._drafted) if d.fetch is not None)
        ends, first = [], 0
        for i in range(1, len(self._drafted)):
            while fetching and fetching[0][0] < i:
                fetching.popleft()
            if self._wave_ends_before(first, i, [d for _, d in fetching]):
                ends.append(i)
                first = i
        return [*ends, len(self._drafted)]

    def _wave_ends_before(self, first: int, i: int, fetching: Iterable[_Drafted]) -> bool:
        """Return whether slice ``i`` is left for the next wave; ``fetching``: all from it on that need a fetch."""
        last, slice_i = self._drafted[i - 1], self._drafted[i]
        if slice_i.part.stage != last.part.stage:
            return True
        if slice_i.fetch is not None and (
            slice_i.after >= first or slice_i.fetch.ready_s > self._drafted[first].begin_s
        ):
            return True
        # A fetch is predicted to begin now, once the wave is done with its slot.
        return any(first <= d.after < i and d.fetch.start_s <= last.end_s for d in fetching if d.fetch is not None)

    def _append(self, part: Slice, slot: int, fetch: _Fetch | None = None) -> None:
        begin_s = self._compute_s
        self._compute_s += part.num_tokens * self._cost.token_s
        self._drafted.append(_Drafted(part, slot, begin_s, self._compute_s, fetch, self._last_use[slot]))
        self._last_use[slot] = len(self._drafted) - 1
        self._free_s[slot] = self._compute_s
