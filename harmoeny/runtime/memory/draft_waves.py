"""Orders a rank's work in waves of many slices where it includes fetches, by predicting when both end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

import numpy as np

from harmoeny.choices import WorkOrder
from harmoeny.runtime.memory.draft import NONE, PAPER_LEAD, Predicted, Slice, closing
from harmoeny.runtime.memory.residents import EMPTY
from harmoeny.runtime.memory.waves import Schedule, ScheduledFetch


def draft_waves(
    parts: Sequence[Slice], home: Sequence[int], times: Predicted, *, work_order: str, wanted: Set[int] | None = None
) -> Schedule:
    """Return the grouped schedule of slices whose experts are not all residents.

    Every wave costs a launch. So a slice whose weights are on their way joins a wave if that has to wait for them for
    less than a launch, and residents are only executed in two waves where the first of them makes room for fetches that
    the other hides.

    Args:
        parts: the slices by priority, see :func:`harmoeny.runtime.memory.schedule.make_schedule`, and so the rest.
        home: expert in every slot.
        times: predicts when fetches and waves begin and end.
        work_order: ``covered`` or ``paper``.
        wanted: the residents after the layer; None: those before it.
    """
    draft = _Waves(parts, home, times, wanted)
    lead = PAPER_LEAD if work_order == WorkOrder.PAPER else len(parts)
    while draft.hits or draft.misses:
        draft.assign_slots()
        if draft.hits and (lead > 0 or not draft.has_fetched()) and not draft.fetched_first():
            lead -= draft.add_residents(lead if lead > 0 else len(parts))
        else:
            draft.add_fetched()
    return draft.schedule()


class _Waves:
    """A schedule while it is being made; times are predicted seconds since the layer's first slice could begin.

    Attributes:
        hits: slices of residents that are still to be added.
        misses: those of other experts, in the order in which they are fetched.
    """

    def __init__(self, parts: Sequence[Slice], home: Sequence[int], times: Predicted, wanted: Set[int] | None) -> None:
        cost, arrivals, head_s = times.cost, times.arrivals, times.head_s
        held = {e for e in home if e != EMPTY}
        self.hits = [p for p in parts if p.expert_id in held]
        from_host_later = {e: arrival_s > cost.fetch_s for e, arrival_s in arrivals.items() if e not in times.halved}
        self.misses = sorted(
            (p for p in parts if p.expert_id not in held),
            key=lambda p: (p.stage, from_host_later.get(p.expert_id, not all(from_host_later.values()))),
        )
        self._home, self._cost, self._times = home, cost, times
        self._wanted = wanted
        self._content = list(home)
        self._slot_of = {e: slot for slot, e in enumerate(home) if e != EMPTY}
        self._due = Counter(p.expert_id for p in self.hits)
        self._awaited: set[int] = set()  # fetched, or to be, and not executed yet
        self._ready_s: dict[int, float] = {}
        self._free_s = [-head_s] * len(home)
        self._last_use = [NONE] * len(home)
        self._now_s, self._link_s = 0.0, -head_s
        self._waves: list[list[tuple[int, Slice]]] = []  # by wave, slot and slice
        self._fetches: list[tuple[int, int, int]] = []  # expert, slot, last wave that uses the slot before

    def assign_slots(self) -> None:
        """Start the fetches for which there are slots, in order."""
        for part in self.misses:
            if part.expert_id in self._slot_of:
                self._awaited.add(part.expert_id)  # nobody behind it may take its slot
                continue
            slot = self._next_slot()
            if slot is None:
                return
            self._slot_of.pop(self._content[slot], None)
            self._content[slot], self._slot_of[part.expert_id] = part.expert_id, slot
            self._awaited.add(part.expert_id)
            self._fetches.append((part.expert_id, slot, self._last_use[slot]))
            ready_s, from_host = self._free_s[slot], self._times.from_host(part.expert_id)
            if from_host:
                ready_s = self._link_s = max(self._link_s, ready_s) + from_host * self._cost.fetch_s
            arrival_s = self._times.arrivals.get(part.expert_id, -np.inf)
            self._ready_s[part.expert_id] = max(ready_s, arrival_s - self._times.head_s)

    def _next_slot(self) -> int | None:
        """Return the slot that is free first; None while all hold experts that are still to be executed."""
        wanted = {p.expert_id for p in self.misses}
        choices = [
            (content in wanted, max(self._link_s, self._free_s[slot]), self._stays(content, slot), slot)
            for slot, content in enumerate(self._content)
            if not self._due.get(content) and content not in self._awaited
        ]
        return min(choices)[-1] if choices else None

    def _stays(self, content: int, slot: int) -> bool:
        """Return whether what lies in a slot would be copied there again."""
        return content == self._home[slot] != EMPTY if self._wanted is None else content in self._wanted

    def has_fetched(self) -> bool:
        """Return whether the next fetched expert has a slot."""
        return bool(self.misses) and self.misses[0].expert_id in self._slot_of

    def fetched_first(self) -> bool:
        """Return whether fetched experts have rows and weights before the next residents have rows."""
        if not self.has_fetched() or self.misses[0].stage >= self.hits[0].stage:
            return False
        return self._ready_s[self.misses[0].expert_id] <= max(self._now_s, self._times.rest_s)

    def add_residents(self, most: int) -> int:
        """Append a wave of at most so many residents of one stage, and what joins them; return how many they are."""
        stage = self.hits[0].stage
        wave = [p for p in self.hits[:most] if p.stage == stage]
        waiting = {p.expert_id for p in self.misses} - self._slot_of.keys()
        parts = [part for part in map(self._times.from_host, waiting) if part > 0]
        from_host = len(parts)
        hidden_s = min(sum(parts) * self._cost.fetch_s, self._wave_s(wave))
        if len(wave) > 1 and from_host and hidden_s > self._cost.launch_s:
            wave = wave[-min(from_host, PAPER_LEAD, len(wave) - 1) :]  # the fewest tokens: their slots are free soonest
        number = len(wave)
        self._await_rows(stage)
        for part in wave:
            self.hits.remove(part)
            self._due[part.expert_id] -= 1
        self._append([*wave, *self._take_fetched(stage, self._now_s)])
        return number

    def add_fetched(self) -> None:
        """Append a wave of experts that are no residents."""
        first = self.misses[0]
        self._await_rows(first.stage)
        self._now_s = max(self._now_s, self._ready_s[first.expert_id])
        self._append(self._take_fetched(first.stage, self._now_s))

    def _await_rows(self, stage: int) -> None:
        if stage > 0:
            self._now_s = max(self._now_s, self._times.rest_s)

    def _take_fetched(self, stage: int, begin_s: float) -> list[Slice]:
        """Take the fetched slices of a stage that a wave which could begin then should wait for."""
        taken: list[Slice] = []
        for part in self.misses:
            ready_s = self._ready_s.get(part.expert_id, 0.0)
            if part.stage != stage or part.expert_id not in self._slot_of or ready_s - begin_s > self._cost.launch_s:
                break
            taken.append(part)
            begin_s = max(begin_s, ready_s)
        self.misses = self.misses[len(taken) :]
        self._awaited.difference_update(p.expert_id for p in taken)
        self._now_s = max(self._now_s, begin_s)
        return taken

    def _append(self, wave: Sequence[Slice]) -> None:
        self._now_s += self._wave_s(wave)
        for part in wave:
            slot = self._slot_of[part.expert_id]
            self._free_s[slot], self._last_use[slot] = self._now_s, len(self._waves)
        self._waves.append(sorted((self._slot_of[p.expert_id], p) for p in wave))

    def _wave_s(self, wave: Sequence[Slice]) -> float:
        """Return how long a wave is predicted to take."""
        tokens_s = sum(p.num_tokens for p in wave) * self._cost.token_s
        return self._cost.launch_s + max(tokens_s, len(wave) * self._cost.weights_s)

    def schedule(self) -> Schedule:
        """Return what was drafted."""
        placed = [(number, slot, part) for number, wave in enumerate(self._waves) for slot, part in wave]
        starts, next_row = [0] * len(placed), 0
        for i in sorted(range(len(placed)), key=lambda i: placed[i][2].stage):
            starts[i] = next_row
            next_row += placed[i][2].num_tokens
        ends, used = [], 0
        for wave in self._waves:
            used += len(wave)
            ends.append(used)
        restores, after = closing(self._home, self._content, self._wanted)
        return Schedule(
            stages=[part.stage for *_, part in placed],
            expert_ids=[part.expert_id for *_, part in placed],
            slots=[slot for _, slot, _ in placed],
            starts=starts,
            num_tokens=[part.num_tokens for *_, part in placed],
            ends=ends,
            fetches=[ScheduledFetch(e, slot, self._first_wave(e, after), after) for e, slot, after in self._fetches],
            restores=restores,
            after=after,
        )

    def _first_wave(self, expert_id: int, after: int) -> int:
        """Return the first wave behind ``after`` that executes the expert."""
        waves = enumerate(self._waves[after + 1 :], after + 1)
        return next(number for number, wave in waves if any(part.expert_id == expert_id for _, part in wave))
