"""The interface of a fetch strategy, and the walk through a schedule that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from harmoeny.choices import Fetch, KernelName, WorkOrder
from harmoeny.cost import ExpertCost
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.runtime.device import Span
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.experts import ExpertStore
from harmoeny.runtime.memory.host import Host
from harmoeny.runtime.memory.residents import EMPTY, SlotsOfAll, home_slots, replace_residents
from harmoeny.runtime.memory.schedule import make_schedule
from harmoeny.runtime.memory.slots import Slot, SlotPool, Transfer
from harmoeny.runtime.memory.transfer import CopyRequest, Transfers
from harmoeny.runtime.memory.waves import Schedule, ScheduledFetch, Wave

#: Executes one wave, whose experts are in the slots that it names.
Execute = Callable[[Wave], None]


@dataclass
class FetchStats:
    """Copies of weights in one layer on one rank, and the stalls that they caused.

    Attributes:
        num_host_fetches: experts fetched from host memory, new residents too.
        num_peer_fetches: experts fetched from another rank.
        num_halved_fetches: those of them of which half came from host memory.
        num_misses: executed experts that were in no slot when the layer began.
        fetch_bytes: size of the fetched experts.
        fetches: one transfer per fetched expert.
        fetch_waits: when computation stood still for them.
        restores: one transfer per overwritten resident that is copied back.
        restore_waits: when computation stood still for those.
        num_ahead: experts that were copied ahead of the gate.
        num_ahead_used: those of them that then had assignments here.
    """

    num_host_fetches: int = 0
    num_peer_fetches: int = 0
    num_halved_fetches: int = 0
    num_misses: int = 0
    fetch_bytes: int = 0
    fetches: list[Transfer] = field(default_factory=list)
    fetch_waits: list[Span] = field(default_factory=list)
    restores: list[Transfer] = field(default_factory=list)
    restore_waits: list[Span] = field(default_factory=list)
    num_ahead: int = 0
    num_ahead_used: int = 0


@dataclass(frozen=True)
class RankMemory:
    """What a fetch strategy works with on one rank; systems share it.

    Attributes:
        store: all experts, in host memory.
        pool: the slots.
        transfers: copies experts into them.
        comm: this rank's communicator.
        cost: an expert's costs on this machine.
        kernel: what computes experts; :func:`harmoeny.runtime.kernels.make_kernel` explains it.
        host: executes experts beside the device; None: nothing does.
    """

    store: ExpertStore
    pool: SlotPool
    transfers: Transfers
    comm: Communicator
    cost: ExpertCost
    kernel: str = KernelName.AUTO
    host: Host | None = None


@dataclass(frozen=True)
class FetchOptions:
    """What a system wants of its expert memory.

    Attributes:
        placements: residency per layer before the first batch.
        num_slots: slots of every layer, at least 1; None: as many as there are residents, at least 1.
        moves: whether placements may change.
        work_order: as :func:`harmoeny.runtime.memory.schedule.make_schedule` explains it.
    """

    placements: Sequence[Placement]
    num_slots: Sequence[int | None]
    work_order: str = WorkOrder.COVERED
    moves: bool = False


class FetchStrategy:
    """One system's expert memory on one rank: what its slots hold, and when experts are copied into them.

    For every layer :meth:`begin` is called once the plan is known, then :meth:`run`. Between batches :meth:`prepare`
    brings the slots to what the placement says, which other systems may have changed, and :meth:`finish` waits for
    copies that are still under way.

    It sees time only through the transfers, so that it runs over a virtual clock as it does on a machine.
    """

    name: ClassVar[Fetch]
    #: Whether a fetch begins as soon as its slot is free, or only when the expert is to be executed.
    ahead: ClassVar[bool] = True

    def __init__(self, memory: RankMemory, options: FetchOptions) -> None:
        """Reserve slots.

        Args:
            memory: shared by the systems of this rank.
            options: the system's.
        """
        self.memory = memory
        self._work_order = options.work_order
        memory.transfers.drain()  # slots whose memory has to grow lose what they hold
        self._slots: list[Sequence[Slot]] = []
        self._home: list[list[int]] = []
        for layer, (placement, num_slots) in enumerate(zip(options.placements, options.num_slots, strict=True)):
            self._home.append(home_slots(placement.resident[:, memory.comm.rank], num_slots))
            self._slots.append(memory.pool.layers[layer].reserve(len(self._home[layer])))
        self._first_home = [list(home) for home in self._home]
        self._options = options
        self._slots_of_all: list[SlotsOfAll] | None = None
        self._schedule = Schedule()
        self._layer = 0
        self._next_fetch = 0
        self._stats = FetchStats()
        self._moved = [FetchStats() for _ in self._home]  # by new placements, since the layer last began
        self._wanted: frozenset[int] | None = None  # after the layer that is planned
        self._ahead: list[list[int]] = [[] for _ in self._home]  # of them, experts copied ahead of the gate

    @property
    def device_bytes(self) -> int:
        """Device memory that this rank's slots take, in bytes."""
        return sum(len(slots) * slots[0].expert_bytes for slots in self._slots)

    @property
    def fills_slots(self) -> bool:
        """Whether the slots' own memory holds the weights; otherwise slots refer to them where they are."""
        return self.memory.transfers.fills_slots

    def reset(self) -> None:
        """Return to the residents of the beginning; :meth:`prepare` copies them in, and nothing is counted."""
        self._home = [list(home) for home in self._first_home]
        if self._slots_of_all is not None:
            self.follow_slots()
        self._moved = [FetchStats() for _ in self._home]
        self._ahead = [[] for _ in self._home]

    def prepare(self) -> None:
        """Copy in the residents that the slots do not hold, and block until they are there."""
        if self.memory.transfers.fills_slots:
            for slots_of_layer in self.memory.pool.layers:
                slots_of_layer.allocate()
        for layer, (slots, home) in enumerate(zip(self._slots, self._home, strict=True)):
            for slot, expert_id in zip(slots, home, strict=True):
                if expert_id == EMPTY:
                    slot.expert_id = EMPTY
                elif slot.expert_id != expert_id:
                    self._copy(layer, slot, expert_id, urgent=False)
        self.memory.transfers.drain()
        for slots in self._slots:
            for slot in slots:
                self.memory.transfers.wait(slot)

    def begin(
        self,
        layer: int,
        fetch: BoolArray,
        executed_SE: IntArray,
        *,
        from_peer: BoolArray | None = None,
        senders: IntArray | None = None,
        halved: BoolArray | None = None,
        grouped: bool = False,
        head_s: float = 0.0,
        rest_s: float = 0.0,
        host_E: BoolArray | None = None,
    ) -> Schedule:
        """Order the layer's slices and start the fetches whose slots are free already.

        Args:
            layer: MoE layer in order of execution.
            fetch: bool ``[num_experts, world_size]``, what all ranks fetch, as the plan says.
            executed_SE: int64 ``[num_stages, num_experts]``, what this rank executes of the plan, as
                :func:`harmoeny.runtime.memory.schedule.make_schedule` explains it.
            from_peer: bool ``[num_experts, world_size]``, what of it peers send, where they can; None: all.
            senders: int64 ``[num_experts, world_size]``, which of them, as of a plan; None: home ranks.
            halved: bool ``[num_experts, world_size]``, what peers send only half of, as of a plan; None: none.
            grouped: as it explains it too, and so the others.
            head_s: seconds.
            rest_s: seconds.
            host_E: bool ``[num_experts]``.
        """
        self._layer, self._next_fetch = layer, 0
        self._stats, self._moved[layer] = self._moved[layer], FetchStats()
        ahead, self._ahead[layer] = self._ahead[layer], []
        self._stats.num_ahead = len(ahead)
        self._stats.num_ahead_used = int(executed_SE[:, ahead].any(axis=0).sum())
        self._open_sources(layer, fetch if from_peer is None else fetch & from_peer, senders, halved)
        self._schedule = make_schedule(
            executed_SE, self._home[layer], self.memory.cost, work_order=self._work_order, grouped=grouped,
            arrivals=self._arrivals(), halved=self._halved(), head_s=head_s, rest_s=rest_s, host_E=host_E,
            wanted=self._wanted,
        )  # fmt: skip
        self._wanted = None
        if self._schedule.fetches or self._schedule.host:
            active = {f.expert_id for f in self._schedule.fetches} | {part.expert_id for part in self._schedule.host}
            self._stats.num_misses = len(active.difference(self._home[layer]))
        if self.ahead:
            self._fetch_until(lambda fetch: fetch.after < 0)
        return self._schedule

    def run(self, execute: Execute) -> FetchStats:
        """Call ``execute`` once for every wave of :meth:`begin`.

        The weights in the wave's slots stay valid until it returns (on CUDA: for the work it queued).
        """
        slots = self._slots[self._layer]
        for wave in self._schedule.waves():
            self.memory.transfers.go_on()
            if not self.ahead:
                self._fetch_until(lambda fetch, now=wave.number: fetch.wave <= now)  # type: ignore[misc]
            for slot in wave.slots:
                if slots[slot].transfer is not None:
                    self._wait(slots[slot], self._stats)
            execute(wave)
            if self.ahead:
                self._fetch_until(lambda fetch, finished=wave.number: fetch.after <= finished)  # type: ignore[misc]
        self._restore()
        self._close_sources()
        return self._stats

    def residents(self, layer: int) -> dict[int, Slot]:
        """Return the slots of a layer's residents by expert; :meth:`prepare` fills them."""
        return {e: slot for e, slot in zip(self._home[layer], self._slots[layer], strict=True) if e != EMPTY}

    def follow_slots(self) -> None:
        """Follow from now on what the slots of all ranks hold, as :meth:`slot_order` tells."""
        layers = zip(self._options.placements, self._options.num_slots, strict=True)
        self._slots_of_all = [SlotsOfAll(placement.resident, num_slots) for placement, num_slots in layers]

    def slot_order(self, layer: int) -> IntArray | None:
        """Return int64 ``[world_size, num_experts]``, for every rank the experts in its slots, then the others.

        None where that is not followed, or slots hold what ranks executed, which they alone know.
        """
        return None if self._slots_of_all is None else self._slots_of_all[layer].order

    def finish(self) -> None:
        """Block until all copies are complete."""
        self.memory.transfers.drain()

    def replace_residents(self, layer: int, placement: Placement, *, ahead: bool = False) -> None:
        """Follow a new placement of a layer; new residents are copied in and counted as fetches of the next batch.

        Args:
            layer: MoE layer in order of execution.
            placement: the new one, of all ranks.
            ahead: it is a guess, made while the layer before is executed: the copies come from host memory, and
                whatever is needed for sure goes before them.
        """
        moved = self._moved[layer]
        if self._slots_of_all is not None:
            self._slots_of_all[layer].replace(placement.resident)
        self._open_moves(layer, placement, ahead=ahead)
        for index in replace_residents(self._home[layer], placement.resident[:, self.memory.comm.rank]):
            slot = self._slots[layer][index]
            expert_id = self._home[layer][index]
            moved.fetches.append(self._move_into(layer, slot, expert_id, urgent=not ahead))
            if ahead:
                self._ahead[layer].append(expert_id)
            moved.fetch_bytes += slot.expert_bytes
            if not self.ahead and (stalled := self.memory.transfers.wait(slot)) is not None:
                moved.fetch_waits.append(stalled)

    def retain(self, placement: Placement) -> None:
        """Let the layer that :meth:`begin` is called for next leave the residents of a placement, of all ranks.

        Those that its slots do not hold then are copied in behind the layers that follow. Experts that this rank held
        before count as restores, others as fetches.
        """
        self._wanted = frozenset(np.flatnonzero(placement.resident[:, self.memory.comm.rank]).tolist())

    def await_residents(self, layer: int, slots: Iterable[Slot]) -> None:
        """Let computation go on only when residents are there, before :meth:`begin`; the layer counts the stalls.

        Args:
            layer: MoE layer in order of execution.
            slots: those of its residents that are about to be read. Later copies into them come behind that.
        """
        for slot in slots:
            if slot.transfer is not None:
                self._wait(slot, self._moved[layer])

    def _wait(self, slot: Slot, stats: FetchStats) -> None:
        """Wait for the copy into a slot, and count the stall by what is copied."""
        transfer = slot.transfer
        stalled = self.memory.transfers.wait(slot)
        if stalled is not None:
            assert transfer is not None, "nothing else is waited for"
            fetched = transfer.urgent or any(transfer is fetch for fetch in stats.fetches)
            (stats.fetch_waits if fetched else stats.restore_waits).append(stalled)

    def _fetch_until(self, begins: Callable[[ScheduledFetch], bool]) -> None:
        """Start fetches, in the order of the schedule, up to the first that does not begin yet."""
        fetches = self._schedule.fetches
        while self._next_fetch < len(fetches) and begins(fetch := fetches[self._next_fetch]):
            slot = self._slots[self._layer][fetch.slot]
            self._stats.fetches.append(self._fetch_into(slot, fetch.expert_id))
            self._stats.fetch_bytes += slot.expert_bytes
            self._next_fetch += 1

    def _fetch_into(self, slot: Slot, expert_id: int) -> Transfer:
        """Start one fetch and count it by its source."""
        self._stats.num_host_fetches += 1
        return self._copy(self._layer, slot, expert_id)

    def _restore(self) -> None:
        """Copy in the residents that are not there: behind what follows, or at once and blocking."""
        transfers, slots, stats = self.memory.transfers, self._slots[self._layer], self._stats
        held, after = self._home[self._layer], self._schedule.after
        for expert_id, slot_index in self._schedule.restores:
            slot = slots[slot_index]
            copy = self._copy(self._layer, slot, expert_id, urgent=not self.ahead)
            if expert_id in held:
                stats.restores.append(copy)
            else:
                stats.fetches.append(copy)
                stats.num_host_fetches += 1
                stats.fetch_bytes += slot.expert_bytes
            if not self.ahead and (stalled := transfers.wait(slot)) is not None:
                stats.restore_waits.append(stalled)
        if after is not None:
            self._home[self._layer] = list(after)
            if self._slots_of_all is not None:
                self._slots_of_all[self._layer].lose()  # what others have now, they alone know

    def _copy(self, layer: int, slot: Slot, expert_id: int, *, urgent: bool = True) -> Transfer:
        source = self.memory.store.layers[layer].expert(expert_id)
        return self.memory.transfers.submit(CopyRequest(slot, expert_id, source, urgent))

    def _open_moves(self, layer: int, placement: Placement, *, ahead: bool) -> None:
        """Prepare sources other than the store for a layer's new residents."""

    def _move_into(self, layer: int, slot: Slot, expert_id: int, *, urgent: bool) -> Transfer:
        """Start copying a new resident, and count it by its source."""
        self._moved[layer].num_host_fetches += 1
        return self._copy(layer, slot, expert_id, urgent=urgent)

    def _open_sources(self, layer: int, fetch: BoolArray, senders: IntArray | None, halved: BoolArray | None) -> None:
        """Prepare sources other than the store for a layer's fetches."""

    def _arrivals(self) -> dict[int, float]:
        """Return when weights from other sources than the store are predicted to be there, by expert, from now on."""
        return {}

    def _halved(self) -> Set[int]:
        """Return the experts of which only half comes from another source than the store."""
        return frozenset()

    def _close_sources(self) -> None:
        """Release them."""
