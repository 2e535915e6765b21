"""What a rank executes in one layer, in which order and from which slots: pure data, no tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


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


class HostSlice(NamedTuple):
    """Rows of one expert that are executed on the host, from the store.

    Attributes:
        expert_id: the expert.
        start: its first row.
        num_tokens: its rows, at least 1.
    """

    expert_id: int
    start: int
    num_tokens: int

    @property
    def rows(self) -> slice:
        """The slice's rows."""
        return slice(self.start, self.start + self.num_tokens)


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
        restores: (expert, slot) to copy after the last wave, so that the slots hold what they are to hold then.
        after: expert in every slot once that is done, ``EMPTY`` where there is none; None: as before the layer.
        host: what is executed on the host, beside the waves.
    """

    stages: Sequence[int] = ()
    expert_ids: Sequence[int] = ()
    slots: Sequence[int] = ()
    starts: Sequence[int] = ()
    num_tokens: Sequence[int] = ()
    ends: Sequence[int] = ()
    fetches: Sequence[ScheduledFetch] = ()
    restores: Sequence[tuple[int, int]] = ()
    after: Sequence[int] | None = None
    host: Sequence[HostSlice] = ()

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
        """Return the experts of a stage's slices, ordered by the slices' rows; those of the host are of stage 0."""
        slices = zip(self.stages, self.starts, self.expert_ids, strict=True)
        starts = [(start, e) for s, start, e in slices if s == stage]
        starts += [(part.start, part.expert_id) for part in self.host if stage == 0]
        return [expert_id for _, expert_id in sorted(starts)]
