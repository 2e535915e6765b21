"""What a rank executes in one layer, in which order and from which slots: pure data, no tensors."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from harmoeny.choices import WorkOrder
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, IntArray

#: Content of a slot that holds no expert.
EMPTY = -1
#: No slot, slice or wave.
_NONE = -1

#: Residents that are executed before the first fetched expert in the paper's order.
_PAPER_LEAD = 2


def num_slots_needed(num_residents: IntArray, num_experts: int, num_slots: int | None = None) -> IntArray:
    """Return how many slots ranks need for a layer, int64, the shape of ``num_residents``.

    Args:
        num_residents: int64, experts that a rank should hold, of one rank or several.
        num_experts: experts in the layer; nobody needs more slots.
        num_slots: slots that were asked for, at least 1; None: one per resident, at least 1.
    """
    wanted = np.maximum(num_residents, 1) if num_slots is None else np.full_like(num_residents, num_slots)
    return np.minimum(wanted, num_experts)


def with_slot(resident: BoolArray, num_slots: IntArray | int) -> BoolArray:
    """Return the residents that have a slot, bool: the first of every rank, where there are more than slots.

    Args:
        resident: bool ``[num_experts]`` of one rank or ``[num_experts, world_size]`` of all.
        num_slots: slots of the rank, or int64 ``[world_size]``.
    """
    kept: BoolArray = resident & (np.cumsum(resident, axis=0) <= num_slots)
    return kept


def home_slots(resident: BoolArray, num_slots: int | None = None) -> list[int]:
    """Return what a rank's slots of a layer hold between batches: its first residents, ``EMPTY`` where there are none.

    Args:
        resident: bool ``[num_experts]``, the experts that the rank should hold.
        num_slots: slots, at least 1; None: as many as there are residents, at least 1.
    """
    room = int(num_slots_needed(resident.sum(), len(resident), num_slots))
    held: list[int] = np.flatnonzero(resident)[:room].tolist()  # as in with_slot, which is slower for one rank
    return held + [EMPTY] * (room - len(held))


def replace_residents(home: list[int], resident: BoolArray) -> list[int]:
    """Change ``home`` (see :func:`home_slots`) to other residents; those that stay keep their slots.

    Returns:
        The slots whose expert has to be copied in.
    """
    wanted = np.flatnonzero(resident)[: len(home)].tolist()
    new = deque(e for e in wanted if e not in home)
    changed = []
    for index, expert_id in enumerate(home):
        if expert_id not in wanted:
            home[index] = new.popleft() if new else EMPTY
            if home[index] != EMPTY:
                changed.append(index)
    return changed


class Wave(NamedTuple):
    """Slices that are executed together: all their weights are there by then, each in a slot of its own.

    Attributes:
        number: position of the wave in its schedule.
        stage: what brings the rows, one stage for all of them.
        expert_ids: the experts.
        slots: slot of every expert.
        starts: first row of every slice.
        num_tokens: rows of every slice, at least 1.
    """

    number: int
    stage: int
    expert_ids: Sequence[int]
    slots: Sequence[int]
    starts: Sequence[int]
    num_tokens: Sequence[int]

    @property
    def rows(self) -> slice:
        """The wave's rows; without gaps where the schedule is grouped."""
        return slice(self.starts[0], self.starts[-1] + self.num_tokens[-1])


class ScheduledFetch(NamedTuple):
    """An expert that is copied into a slot.

    Attributes:
        expert_id: the expert.
        slot: the slot.
        wave: number of the first wave that executes it.
        after: number of the last wave that uses the slot before; -1 where the fetch can begin at once.
    """

    expert_id: int
    slot: int
    wave: int
    after: int


@dataclass(frozen=True)
class Schedule:
    """Order of a rank's work in one layer: waves of slices.

    Attributes:
        stages: stage of every slice, in order of execution.
        expert_ids: expert of every slice.
        slots: slot of every slice.
        starts: first row of every slice.
        num_tokens: rows of every slice.
        ends: one behind the last slice of every wave.
        fetches: in the order in which they begin.
        restores: (expert, slot) to copy after the last wave, so that the slots hold what they held before.
    """

    stages: Sequence[int] = ()
    expert_ids: Sequence[int] = ()
    slots: Sequence[int] = ()
    starts: Sequence[int] = ()
    num_tokens: Sequence[int] = ()
    ends: Sequence[int] = ()
    fetches: Sequence[ScheduledFetch] = ()
    restores: Sequence[tuple[int, int]] = ()

    def waves(self) -> Iterator[Wave]:
        """Return the waves in order of execution."""
        begin = 0
        for number, end in enumerate(self.ends):
            part = slice(begin, end)
            yield Wave(
                number, self.stages[begin], self.expert_ids[part], self.slots[part], self.starts[part],
                self.num_tokens[part],
            )  # fmt: skip
            begin = end

    def experts_by_row(self, stage: int = 0) -> list[int]:
        """Return the experts of a stage's slices, ordered by the slices' rows."""
        slices = zip(self.stages, self.starts, self.expert_ids, strict=True)
        return [expert_id for _, expert_id in sorted((start, e) for s, start, e in slices if s == stage)]


def make_schedule(
    executed_SE: IntArray,
    home: Sequence[int],
    cost: ExpertCost,
    *,
    work_order: str = WorkOrder.COVERED,
    grouped: bool = False,
) -> Schedule:
    """Order a rank's slices so that fetches hide behind computation.

    Fetches run at most two experts ahead, each into a slot that is free by then: the slot of the expert executed two
    slices before, as in the paper (arXiv 2506.12417, section 4.2), or, where that gives an earlier start, a slot whose
    resident has no tokens in this batch. ``paper`` executes the two residents with the most tokens first, then the
    fetched experts, then the other residents. ``covered`` executes residents until the next fetched expert is predicted
    to be there, so that small residents are no reason to stall. Residents, and fetched experts too, come by stage, and
    within a stage those with the most tokens first.

    Rows lie by stage. Within a stage they are ordered by expert and every slice is a wave of its own; a grouped
    schedule orders them by wave and slot, and its waves are as large as they can be without holding up a slice whose
    weights are there, or a fetch that waits for a slot.

    Args:
        executed_SE: int64 ``[num_stages, num_experts]``, rows per expert that arrive at each stage of an exchange.
        home: expert in every slot before and after the layer, ``EMPTY`` where there is none; at least one slot.
        cost: predicts when fetches and slices end.
        work_order: ``covered`` or ``paper``.
        grouped: execute many slices at once.

    Returns:
        The schedule; every slice is executed once, and a fetch never overwrites a slot that an earlier wave needs.
    """
    stages, experts = np.nonzero(executed_SE)
    num_tokens = executed_SE[stages, experts]
    content = np.asarray(home)
    slot_of = np.full(executed_SE.shape[1], _NONE)
    held = np.flatnonzero(content != EMPTY)
    slot_of[content[held]] = held
    slots = slot_of[experts]
    if slots.size and slots.min() == _NONE:
        order = np.lexsort((experts, -num_tokens, stages))
        parts = list(map(_Slice, stages[order].tolist(), experts[order].tolist(), num_tokens[order].tolist()))
        return _with_fetches(parts, home, cost, work_order=work_order, grouped=grouped)
    starts = np.cumsum(num_tokens) - num_tokens
    order = np.lexsort((slots, stages)) if grouped else np.lexsort((-num_tokens, stages))
    num_tokens, count = num_tokens[order], len(order)
    ends = np.flatnonzero(np.diff(stages, append=_NONE)) + 1 if grouped else np.arange(1, count + 1)
    starts = np.cumsum(num_tokens) - num_tokens if grouped else starts[order]
    return Schedule(
        stages.tolist(), experts[order].tolist(), slots[order].tolist(), starts.tolist(), num_tokens.tolist(),
        ends.tolist(),
    )  # fmt: skip


def _with_fetches(
    parts: Sequence[_Slice], home: Sequence[int], cost: ExpertCost, *, work_order: str, grouped: bool
) -> Schedule:
    """Return the schedule of slices, by priority, whose experts are not all residents."""
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


class _Slice(NamedTuple):
    """Rows of one expert that arrive at one stage."""

    stage: int
    expert_id: int
    num_tokens: int


class _Fetch(NamedTuple):
    """The next fetch: its slot, when it is predicted to begin and to be complete, and whether it is needed at all."""

    slot: int
    start_s: float
    ready_s: float
    needed: bool


class _Drafted(NamedTuple):
    """A slice in its place, with the fetch that it needs and the last slice that uses the slot before that."""

    part: _Slice
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
        self._last_use = [_NONE] * len(home)
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

    def add_resident(self, part: _Slice) -> None:
        """Append a resident's slice."""
        self._due[part.expert_id] -= 1
        self._append(part, self._slot_of[part.expert_id])

    def add_fetched(self, part: _Slice, fetch: _Fetch) -> None:
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
        drafted, ends = self._drafted, list(range(1, len(self._drafted) + 1))
        if grouped:
            ends = self._wave_ends()
        wave_of = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0)).tolist()
        fetches = [
            ScheduledFetch(d.part.expert_id, d.slot, wave_of[i], wave_of[d.after] if d.after != _NONE else _NONE)
            for i, d in enumerate(drafted)
            if d.fetch is not None
        ]
        if grouped:
            drafted = [
                d for _, d in sorted(zip(wave_of, drafted, strict=True), key=lambda item: (item[0], item[1].slot))
            ]
            by_row = sorted(range(len(drafted)), key=lambda i: (drafted[i].part.stage, i))
        else:
            by_row = sorted(range(len(drafted)), key=lambda i: drafted[i].part)
        starts, next_row = [0] * len(drafted), 0
        for i in by_row:
            starts[i] = next_row
            next_row += drafted[i].part.num_tokens
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
        ends, first = [], 0
        for i in range(1, len(self._drafted)):
            if self._wave_ends_before(first, i):
                ends.append(i)
                first = i
        return [*ends, len(self._drafted)]

    def _wave_ends_before(self, first: int, i: int) -> bool:
        """Return whether slice ``i`` is not in the wave of slices ``first`` to ``i - 1``."""
        last, slice_i = self._drafted[i - 1], self._drafted[i]
        if slice_i.part.stage != last.part.stage:
            return True
        if slice_i.fetch is not None and (
            slice_i.after >= first or slice_i.fetch.ready_s > self._drafted[first].begin_s
        ):
            return True
        # A fetch is predicted to begin now, once the wave is done with its slot.
        return any(
            d.fetch is not None and first <= d.after < i and d.fetch.start_s <= last.end_s for d in self._drafted[i:]
        )

    def _append(self, part: _Slice, slot: int, fetch: _Fetch | None = None) -> None:
        begin_s = self._compute_s
        self._compute_s += part.num_tokens * self._cost.token_s
        self._drafted.append(_Drafted(part, slot, begin_s, self._compute_s, fetch, self._last_use[slot]))
        self._last_use[slot] = len(self._drafted) - 1
        self._free_s[slot] = self._compute_s
