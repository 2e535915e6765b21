"""A rank on a virtual clock: copies of weights and computation take the seconds that the cost model says."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from harmoeny.runtime.device import Span
from harmoeny.runtime.exchange.comm import Communicator, PeerCopies
from harmoeny.runtime.memory.slots import Slot, Transfer
from harmoeny.runtime.memory.transfer import CopyRequest, Transfers

#: Tensors here have shapes but no data.
META = torch.device("meta")


class _Restore(NamedTuple):
    """A restore in the queue: its transfer, when it could begin, and how long it takes."""

    transfer: Transfer
    ready_s: float
    duration_s: float


class VirtualTransfers(Transfers):
    """Copies over one rank's host link, one at a time, beside its computation; all times are seconds of one clock.

    A fetch overtakes the restores that have not begun. Weights from peers take nothing of the host link,
    and those of which peers send half take half a copy of it.

    Attributes:
        now_s: the clock of the rank's computation; whoever advances the rank may set it.
        copy_s: duration of the copies from host memory that are submitted from now on.
        free_s: when the last copy so far ends.
        owed_s: what copies beside the computation have taken from it and the next expert has still to wait.
        restoring_s: what restores take from whatever follows the layer; whoever reads it sets it back.
    """

    link = "simulated"
    fills_slots = False

    def __init__(self, processor_share: float = 0.0) -> None:
        """Start at time 0 with an idle link.

        Args:
            processor_share: share of a copy's time in which it keeps the processor from computing.
        """
        self.now_s = self.copy_s = self.free_s = self.owed_s = self.restoring_s = 0.0
        self._processor_share = processor_share
        self._arrived_s = 0.0
        self._restores: deque[_Restore] = deque()
        self._slots: list[Slot] = []

    def submit(self, request: CopyRequest) -> Transfer:
        """Queue a copy at the present time."""
        transfer = Transfer(urgent=request.urgent)
        request.slot.expert_id, request.slot.transfer = request.expert_id, transfer
        self._slots.append(request.slot)
        if request.arrival is not None:
            self._arrived_s = self.now_s
            request.arrival()
            transfer.span = (self.now_s, self._arrived_s)
            if request.rest is not None:
                self._fetch(transfer, self.copy_s / 2)
                begin_s, copied_s = transfer.span
                transfer.span = (begin_s, max(copied_s, self._arrived_s))
        elif request.urgent:
            self._fetch(transfer, self.copy_s)
        else:
            self._restores.append(_Restore(transfer, self.now_s, self.copy_s))
            self.restoring_s += self._processor_share * self.copy_s
        return transfer

    def beside(self, work: Callable[[], None]) -> Transfer:
        """Do it at once: what is not a copy takes no time here."""
        work()
        return Transfer()

    def arrive(self, arrival_s: float) -> None:
        """Note, while a copy is submitted, when the peer's weights that it waits for are there."""
        self._arrived_s = max(self._arrived_s, arrival_s)

    def wait(self, slot: Slot) -> Span | None:
        """Advance the clock to the end of the slot's copy."""
        transfer, slot.transfer = slot.transfer, None
        if transfer is None:
            return None
        while transfer.span is None:
            self._restore_next()
        end_s = transfer.span[1]
        assert isinstance(end_s, float)
        if end_s <= self.now_s:
            return None
        span = (self.now_s, end_s)
        # While computation stands still, the processor is free to copy.
        self.owed_s = max(0.0, self.owed_s - (end_s - self.now_s))
        self.now_s = end_s
        return span

    def compute(self, seconds: float) -> None:
        """Advance the clock by a computation, and by what copies took from it."""
        self.now_s += seconds + self.owed_s
        self.owed_s = 0.0

    def drain(self) -> None:
        """Complete all copies and advance the clock to the end of the last one."""
        while self._restores:
            self._restore_next()
        for slot in self._slots:
            slot.transfer = None
        self._slots = []
        self.now_s = max(self.now_s, self.free_s)

    def restart(self) -> None:
        """Set the clock back to 0; nothing may be under way."""
        assert not self._slots, "drain first"
        self.now_s = self.free_s = self.owed_s = self.restoring_s = 0.0

    def _fetch(self, transfer: Transfer, duration_s: float) -> None:
        """Occupy the link with a fetch from host memory, behind the restores that have begun."""
        while self._restores and max(self.free_s, self._restores[0].ready_s) < self.now_s:
            self._restore_next()
        self._occupy(transfer, self.now_s, duration_s)
        self.owed_s += self._processor_share * duration_s

    def _restore_next(self) -> None:
        self._occupy(*self._restores.popleft())

    def _occupy(self, transfer: Transfer, ready_s: float, duration_s: float) -> None:
        begin_s = max(self.free_s, ready_s)
        self.free_s = begin_s + duration_s
        transfer.span = (begin_s, self.free_s)


class _Arrival:
    """Weights on their way from a peer."""

    def __init__(self, transfers: VirtualTransfers, arrival_s: float) -> None:
        self._transfers, self._arrival_s = transfers, arrival_s

    def wait(self) -> None:
        """Tell the transfers when the weights are there."""
        self._transfers.arrive(self._arrival_s)


class VirtualCommunicator(Communicator):
    """One rank's place among the others, of which a fetch strategy needs no more than weights from peers.

    Attributes:
        arrival_s: when all weights that peers send this rank in the present layer are there, seconds.
    """

    def __init__(self, rank: int, world_size: int, transfers: VirtualTransfers) -> None:
        """Take a rank's place without a process group."""
        super().__init__(META)
        self.rank, self.world_size = rank, world_size
        self.arrival_s = 0.0
        self._transfers = transfers

    def duplicate(self) -> VirtualCommunicator:
        """Return this one: here traffic never queues behind other traffic."""
        return self

    def copy_between_peers(
        self,
        sends: Sequence[tuple[Tensor, int]],  # noqa: ARG002  (sends take nothing from who sends)
        receives: Sequence[tuple[Tensor, int]],
    ) -> PeerCopies:
        """Start receiving; everything arrives at :attr:`arrival_s`."""
        return PeerCopies(receiving=[[_Arrival(self._transfers, self.arrival_s)] for _ in receives], sending=[])
