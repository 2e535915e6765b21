"""What a rank has to execute in one layer, and in which order and slots: pure data, no tensors.

The real runtime executes these schedules, and anything that models it can read the same ones.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from harmoeny.choices import WorkOrder
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray

#: Content of a slot that holds no expert.
EMPTY = -1

#: Residents that are executed before the first fetched expert in the paper's order.
_PAPER_LEAD = 2


def home_slots(resident: BoolArray, num_slots: int | None = None) -> list[int]:
    """Return what a rank's slots of a layer hold between batches: its first residents, ``EMPTY`` where there are none.

    Args:
        resident: bool ``[num_experts]``, the experts that the rank should hold.
        num_slots: slots, at least 1; None: as many as there are residents, at least 1.
    """
    held = [int(e) for e in np.flatnonzero(resident)]
    room = min(len(resident), num_slots if num_slots is not None else max(1, len(held)))
    return held[:room] + [EMPTY] * (room - len(held))


def replace_residents(home: list[int], resident: BoolArray) -> list[int]:
    """Change ``home`` (see :func:`home_slots`) to other residents; those that stay keep their slots.

    Returns:
        The slots with an expert that has to be loaded.
    """
    wanted = [int(e) for e in np.flatnonzero(resident)][: len(home)]
    new = deque(e for e in wanted if e not in home)
    loads = []
    for index, expert_id in enumerate(home):
        if expert_id not in wanted:
            home[index] = new.popleft() if new else EMPTY
            if home[index] != EMPTY:
                loads.append(index)
    return loads


@dataclass(frozen=True)
class ExpertWork:
    """One expert's slice of the rows that a rank executes.

    Attributes:
        expert_id: the expert.
        start: first row of the slice.
        num_tokens: rows in the slice, at least 1.
    """

    expert_id: int
    start: int
    num_tokens: int


@dataclass(frozen=True)
class Step:
    """Execution of one slice.

    Attributes:
        work: the slice.
        slot: slot that holds the expert's weights by then.
        load: whether the expert is loaded into the slot first.
        after: index of the step that uses the slot last before the load; -1 where the load can begin at once.
    """

    work: ExpertWork
    slot: int
    load: bool = False
    after: int = -1


@dataclass(frozen=True)
class Schedule:
    """Order of a rank's work in one layer.

    Attributes:
        steps: in order of execution; loads begin in this order too.
        restores: (expert, slot) to load after the last step, so that the slots hold what they held before.
    """

    steps: tuple[Step, ...]
    restores: tuple[tuple[int, int], ...]


@dataclass
class _Slots:
    """Slots while a schedule is being made; times are predicted seconds since the layer's first step."""

    home: Sequence[int]

    def __post_init__(self) -> None:
        self.content = list(self.home)
        self.last_step = [-1] * len(self.home)
        self.free_s = [0.0] * len(self.home)


def make_schedule(
    work: Sequence[ExpertWork],
    home: Sequence[int],
    cost: ExpertCost,
    *,
    work_order: str = WorkOrder.COVERED,
    keep_order: bool = False,
) -> Schedule:
    """Order a rank's work so that loads hide behind computation.

    Fetched experts are loaded at most two ahead of their execution, each into a slot that is free by then: the slot of
    the expert executed two steps before, as in the paper (arXiv 2506.12417, section 4.2), or, where that gives an
    earlier start, a slot whose resident has no tokens in this batch. ``paper`` executes the two residents with the most
    tokens first, then the fetched experts, then the other residents. ``covered`` executes residents until the next
    fetched expert is predicted to be there, so that small residents are no reason to stall.

    Args:
        work: the slices; an expert may have several.
        home: expert in every slot before and after the layer, ``EMPTY`` where there is none; at least one slot.
        cost: predicts when loads and steps end.
        work_order: ``covered`` or ``paper``.
        keep_order: execute residents in the order of ``work``, and fetched experts too, instead of the largest first.

    Returns:
        The schedule; every slice is executed once, and a load never touches a slot that a step before it still needs.
    """
    slots = _Slots(home)
    ordered = work if keep_order else sorted(work, key=lambda w: (-w.num_tokens, w.expert_id, w.start))
    hits = deque(w for w in ordered if w.expert_id in slots.content)
    misses = deque(w for w in ordered if w.expert_id not in slots.content)
    needed = Counter(w.expert_id for w in hits)
    steps: list[Step] = []
    compute_s = link_s = 0.0
    miss_ends_s = [0.0, 0.0]
    load: _Load | None = None
    while hits or misses:
        if misses and load is None:
            # Two loads ahead keep the link busy; more would only overwrite more residents.
            load = _next_load(misses[0].expert_id, needed, slots, max(link_s, miss_ends_s[-2]), cost.fetch_s)
        if load is None:
            hit_next = True
        elif work_order == WorkOrder.PAPER:
            hit_next = bool(hits) and len(steps) < _PAPER_LEAD
        else:
            hit_next = bool(hits) and load.ready_s > compute_s
        if hit_next:
            item = hits.popleft()
            needed[item.expert_id] -= 1
            step = Step(item, slots.content.index(item.expert_id))
            compute_s += item.num_tokens * cost.token_s
        else:
            assert load is not None, "without a load there are hits"
            item = misses.popleft()
            step = Step(item, load.slot, load=load.needed, after=slots.last_step[load.slot])
            slots.content[load.slot] = item.expert_id
            if load.needed:
                link_s = load.ready_s
            compute_s = max(compute_s, load.ready_s) + item.num_tokens * cost.token_s
            miss_ends_s.append(compute_s)
            load = None
        slots.last_step[step.slot] = len(steps)
        slots.free_s[step.slot] = compute_s
        steps.append(step)
    return Schedule(
        tuple(steps),
        tuple((e, slot) for slot, e in enumerate(home) if e not in (EMPTY, slots.content[slot])),
    )


class _Load(NamedTuple):
    """The next load: its slot, when it is predicted to be there, and whether it is needed at all."""

    slot: int
    ready_s: float
    needed: bool


def _next_load(
    expert_id: int, needed: Mapping[int, int], slots: _Slots, earliest_s: float, fetch_s: float
) -> _Load | None:
    """Choose the slot for a fetched expert; None while residents that still have work fill all slots."""
    if expert_id in slots.content:
        return _Load(slots.content.index(expert_id), 0.0, needed=False)
    choices = [
        (max(earliest_s, slots.free_s[slot]), content == slots.home[slot] != EMPTY, slot)
        for slot, content in enumerate(slots.content)
        if not needed.get(content)
    ]
    if not choices:
        return None
    start_s, _, slot = min(choices)
    return _Load(slot, start_s + fetch_s, needed=True)
