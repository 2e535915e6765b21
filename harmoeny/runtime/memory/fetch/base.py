"""The interface of a fetch strategy, and the walk through a schedule that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from harmoeny.choices import Fetch, WorkOrder
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray
from harmoeny.plan import Plan
from harmoeny.runtime.device import Span
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.experts import ExpertStore
from harmoeny.runtime.memory.schedule import (
    EMPTY,
    ExpertWork,
    Schedule,
    Step,
    home_slots,
    make_schedule,
    replace_residents,
)
from harmoeny.runtime.memory.slots import Slot, SlotPool, Transfer
from harmoeny.runtime.memory.transfer import TransferEngine

#: Executes one slice of the batch with the weights given.
Execute = Callable[[ExpertWork, Mapping[str, Tensor]], None]


@dataclass
class FetchStats:
    """What moving weights came to in one layer on one rank.

    Attributes:
        num_host_fetches: experts fetched from host memory.
        num_peer_fetches: experts fetched from another rank.
        fetch_bytes: size of the fetched experts.
        fetches: the loads of fetched experts.
        fetch_waits: when computation stood still for them.
        restores: the loads of residents.
        restore_waits: when computation stood still for those.
    """

    num_host_fetches: int = 0
    num_peer_fetches: int = 0
    fetch_bytes: int = 0
    fetches: list[Transfer] = field(default_factory=list)
    fetch_waits: list[Span] = field(default_factory=list)
    restores: list[Transfer] = field(default_factory=list)
    restore_waits: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class RankMemory:
    """What a fetch strategy works with on one rank; systems share it.

    Attributes:
        store: all experts, in host memory.
        pool: the slots.
        engine: loads them.
        comm: this rank's communicator.
        cost: an expert's costs on this machine.
    """

    store: ExpertStore
    pool: SlotPool
    engine: TransferEngine
    comm: Communicator
    cost: ExpertCost


class FetchStrategy:
    """One system's expert memory on one rank: what its slots hold, and when loads begin.

    For every layer :meth:`begin` is called once the plan is known, then :meth:`run`. Between batches :meth:`prepare`
    brings the slots to what the placement says, which other systems may have changed, and :meth:`finish` waits for
    loads that are still under way.
    """

    name: ClassVar[Fetch]
    #: Whether loads begin as soon as their slot is free, or only when the expert is to be executed.
    ahead: ClassVar[bool] = True

    def __init__(
        self,
        memory: RankMemory,
        resident: Sequence[BoolArray],
        *,
        num_slots: int | None = None,
        work_order: str = WorkOrder.COVERED,
    ) -> None:
        """Reserve slots.

        Args:
            memory: shared by the systems of this rank.
            resident: bool ``[num_experts]`` per layer, the experts that this rank should hold.
            num_slots: slots per layer, at least 1; None: as many as there are residents, at least 1.
            work_order: as :func:`harmoeny.runtime.memory.schedule.make_schedule` explains it.
        """
        self.memory = memory
        self._work_order = work_order
        self._slots: list[Sequence[Slot]] = []
        self._home: list[list[int]] = []
        for layer, held in enumerate(resident):
            self._home.append(home_slots(held, num_slots))
            self._slots.append(memory.pool.reserve(layer, len(self._home[layer])))
        self._schedule = Schedule((), ())
        self._layer = 0
        self._next_load = 0
        self._stats = FetchStats()
        self._moved = FetchStats()  # by a new placement, since the last layer began

    @property
    def device_bytes(self) -> int:
        """Device memory that this rank's slots take, in bytes."""
        return sum(len(slots) * slots[0].experts.expert_bytes for slots in self._slots)

    def prepare(self) -> None:
        """Load the residents that the slots do not hold, and block until they are there."""
        for layer, (slots, home) in enumerate(zip(self._slots, self._home, strict=True)):
            for slot, expert_id in zip(slots, home, strict=True):
                if expert_id == EMPTY:
                    slot.expert_id = EMPTY
                elif slot.expert_id != expert_id:
                    self._load(layer, slot, expert_id, urgent=False)
        self.memory.engine.drain()
        for slots in self._slots:
            for slot in slots:
                self.memory.engine.wait(slot)

    def begin(self, layer: int, plan: Plan, work: Sequence[ExpertWork], *, keep_order: bool = False) -> None:
        """Order the layer's work and start the loads whose slots are free already.

        Args:
            layer: MoE layer in order of execution.
            plan: the layer's plan.
            work: what this rank executes of it.
            keep_order: as :func:`harmoeny.runtime.memory.schedule.make_schedule` explains it.
        """
        self._layer, self._next_load = layer, 0
        self._stats, self._moved = self._moved, FetchStats()
        self._open_sources(layer, plan)
        self._schedule = make_schedule(
            work, self._home[layer], self.memory.cost, work_order=self._work_order, keep_order=keep_order
        )
        if self.ahead:
            self._load_ahead(-1)

    def run(self, execute: Execute) -> FetchStats:
        """Call ``execute`` once for every slice of :meth:`begin`.

        The weights handed to ``execute`` stay valid until it returns (on CUDA: for the work it queued).
        """
        engine, slots, stats = self.memory.engine, self._slots[self._layer], self._stats
        for index, step in enumerate(self._schedule.steps):
            slot = slots[step.slot]
            if step.load and not self.ahead:
                self._fetch(step)
            stalled = engine.wait(slot)
            if stalled is not None:
                (stats.fetch_waits if step.load else stats.restore_waits).append(stalled)
            execute(step.work, slot.weights)
            engine.used(slot)
            if self.ahead:
                self._load_ahead(index)
        for expert_id, slot_index in self._schedule.restores:
            stats.restores.append(self._load(self._layer, slots[slot_index], expert_id, urgent=not self.ahead))
            if not self.ahead and (stalled := engine.wait(slots[slot_index])) is not None:
                stats.restore_waits.append(stalled)
        self._close_sources()
        return stats

    def residents(self, layer: int) -> dict[int, Slot]:
        """Return the slots of a layer's residents by expert; :meth:`prepare` fills them.

        Whoever executes from them instead of :meth:`run` tells the engine that they are used.
        """
        return {e: slot for e, slot in zip(self._home[layer], self._slots[layer], strict=True) if e != EMPTY}

    def finish(self) -> None:
        """Block until all loads are complete."""
        self.memory.engine.drain()

    def place(self, layer: int, resident: BoolArray) -> None:
        """Change a layer's residents; what is not held yet is loaded and counted like a fetch of the next batch.

        Args:
            layer: MoE layer in order of execution.
            resident: bool ``[num_experts]``.
        """
        for index in replace_residents(self._home[layer], resident):
            slot = self._slots[layer][index]
            self._moved.fetches.append(self._load(layer, slot, self._home[layer][index]))
            self._moved.num_host_fetches += 1
            self._moved.fetch_bytes += slot.experts.expert_bytes
            if not self.ahead and (stalled := self.memory.engine.wait(slot)) is not None:
                self._moved.fetch_waits.append(stalled)

    def _load_ahead(self, finished_step: int) -> None:
        """Start, in the order of their execution, the loads whose slots are free after ``finished_step``."""
        steps = self._schedule.steps
        while self._next_load < len(steps):
            step = steps[self._next_load]
            if step.load and step.after > finished_step:
                return
            if step.load:
                self._fetch(step)
            self._next_load += 1

    def _fetch(self, step: Step) -> None:
        expert_id = step.work.expert_id
        slot = self._slots[self._layer][step.slot]
        self._stats.fetches.append(self._fetch_into(slot, expert_id))
        self._stats.fetch_bytes += slot.experts.expert_bytes

    def _fetch_into(self, slot: Slot, expert_id: int) -> Transfer:
        """Start one fetch and count it by its source."""
        self._stats.num_host_fetches += 1
        return self._load(self._layer, slot, expert_id)

    def _load(self, layer: int, slot: Slot, expert_id: int, *, urgent: bool = True) -> Transfer:
        source = self.memory.store.layers[layer].expert(expert_id)
        return self.memory.engine.submit(slot, expert_id, source, urgent=urgent)

    def _open_sources(self, layer: int, plan: Plan) -> None:
        """Prepare sources other than the store for a layer's fetches."""

    def _close_sources(self) -> None:
        """Release them."""
