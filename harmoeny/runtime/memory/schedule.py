"""What a rank executes in one layer, in which order and from which slots: pure data, no tensors."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from harmoeny.choices import WorkOrder
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, IntArray

#: Content of a slot that holds no expert.
EMPTY = -1

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


class ExpertSlice(NamedTuple):
    """Rows of one expert among those that a rank executes.

    Attributes:
        expert_id: the expert.
        start: first row of the slice.
        num_tokens: rows in the slice, at least 1.
    """

    expert_id: int
    start: int
    num_tokens: int


class ScheduledSlice(NamedTuple):
    """A slice and where its expert's weights are when its turn comes.

    Attributes:
        part: the slice.
        slot: slot that holds the expert's weights by then.
        fetch: whether the expert is fetched into the slot first.
        after: index of the last slice that uses the slot before the fetch; -1 where the fetch can begin at once.
    """

    part: ExpertSlice
    slot: int
    fetch: bool = False
    after: int = -1


@dataclass(frozen=True)
class Schedule:
    """Order of a rank's work in one layer.

    Attributes:
        slices: in order of execution; fetches begin in this order too.
        restores: (expert, slot) to copy after the last slice, so that the slots hold what they held before.
    """

    slices: tuple[ScheduledSlice, ...]
    restores: tuple[tuple[int, int], ...]


def slices_by_expert(executed: IntArray) -> list[ExpertSlice]:
    """Return one slice per expert that has rows, which are grouped by ascending expert.

    Args:
        executed: int64 ``[num_experts]``, rows per expert.
    """
    experts = np.flatnonzero(executed)
    num_tokens = executed[experts]
    starts = np.cumsum(num_tokens) - num_tokens
    return list(map(ExpertSlice, experts.tolist(), starts.tolist(), num_tokens.tolist()))


def make_schedule(
    parts: Sequence[ExpertSlice],
    home: Sequence[int],
    cost: ExpertCost,
    *,
    work_order: str = WorkOrder.COVERED,
    keep_order: bool = False,
) -> Schedule:
    """Order a rank's slices so that fetches hide behind computation.

    Fetches run at most two experts ahead, each into a slot that is free by then: the slot of the expert executed two
    slices before, as in the paper (arXiv 2506.12417, section 4.2), or, where that gives an earlier start, a slot whose
    resident has no tokens in this batch. ``paper`` executes the two residents with the most tokens first, then the
    fetched experts, then the other residents. ``covered`` executes residents until the next fetched expert is predicted
    to be there, so that small residents are no reason to stall.

    Args:
        parts: the slices; an expert may have several.
        home: expert in every slot before and after the layer, ``EMPTY`` where there is none; at least one slot.
        cost: predicts when fetches and slices end.
        work_order: ``covered`` or ``paper``.
        keep_order: execute residents in the order of ``parts``, and fetched experts too, instead of the largest first.

    Returns:
        The schedule; every slice is executed once, and a fetch never overwrites a slot that an earlier slice needs.
    """
    ordered = parts if keep_order else sorted(parts, key=lambda p: (-p.num_tokens, p.expert_id, p.start))
    slot_of = {expert_id: slot for slot, expert_id in enumerate(home) if expert_id != EMPTY}
    hits = deque(p for p in ordered if p.expert_id in slot_of)
    misses = deque(p for p in ordered if p.expert_id not in slot_of)
    if not misses:
        return Schedule(tuple(ScheduledSlice(p, slot_of[p.expert_id]) for p in hits), ())
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
    return Schedule(tuple(draft.slices), draft.restores())


class _Fetch(NamedTuple):
    """The next fetch: its slot, when it is predicted to be complete, and whether it is needed at all."""

    slot: int
    ready_s: float
    needed: bool


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
        self.slices: list[ScheduledSlice] = []
        self._home, self._slot_of, self._due, self._cost = home, slot_of, due, cost
        self._content = list(home)
        self._last_use = [-1] * len(home)
        self._free_s = [0.0] * len(home)
        self._compute_s = self._link_s = 0.0
        # Two fetches ahead keep the link busy; more would only overwrite more residents.
        self._fetched_ends_s = deque([0.0, 0.0], maxlen=2)

    def next_fetch(self, expert_id: int) -> _Fetch | None:
        """Choose the slot for an expert; None while residents that still have slices fill all slots."""
        if expert_id in self._slot_of:
            return _Fetch(self._slot_of[expert_id], 0.0, needed=False)
        earliest_s = max(self._link_s, self._fetched_ends_s[0])
        choices = [
            (max(earliest_s, self._free_s[slot]), content == self._home[slot] != EMPTY, slot)
            for slot, content in enumerate(self._content)
            if not self._due.get(content)
        ]
        if not choices:
            return None
        start_s, _, slot = min(choices)
        return _Fetch(slot, start_s + self._cost.fetch_s, needed=True)

    def resident_first(self, fetch: _Fetch, work_order: str) -> bool:
        """Return whether a resident is executed before the expert that is fetched next."""
        if work_order == WorkOrder.PAPER:
            return len(self.slices) < _PAPER_LEAD
        return fetch.ready_s > self._compute_s

    def add_resident(self, part: ExpertSlice) -> None:
        """Append a resident's slice."""
        self._due[part.expert_id] -= 1
        self._append(ScheduledSlice(part, self._slot_of[part.expert_id]))

    def add_fetched(self, part: ExpertSlice, fetch: _Fetch) -> None:
        """Append a slice of an expert that is no resident."""
        slot = fetch.slot
        if fetch.needed:
            self._slot_of.pop(self._content[slot], None)
            self._content[slot], self._slot_of[part.expert_id] = part.expert_id, slot
            self._link_s = fetch.ready_s
        self._compute_s = max(self._compute_s, fetch.ready_s)
        self._append(ScheduledSlice(part, slot, fetch.needed, self._last_use[slot]))
        self._fetched_ends_s.append(self._compute_s)

    def restores(self) -> tuple[tuple[int, int], ...]:
        """Return (expert, slot) of the residents that were overwritten."""
        slots = enumerate(zip(self._home, self._content, strict=True))
        return tuple((expert_id, slot) for slot, (expert_id, now) in slots if expert_id not in (EMPTY, now))

    def _append(self, scheduled: ScheduledSlice) -> None:
        self._compute_s += scheduled.part.num_tokens * self._cost.token_s
        self._last_use[scheduled.slot] = len(self.slices)
        self._free_s[scheduled.slot] = self._compute_s
        self.slices.append(scheduled)
