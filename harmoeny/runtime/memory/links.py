"""What brings weights from host memory to a device, and an emulated link, which takes no processor."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from harmoeny.hardware import Hardware
from harmoeny.runtime.device import Device, Mark, Span
from harmoeny.runtime.memory.slots import Slot, Transfer
from harmoeny.runtime.memory.transfer import (
    LATER,
    URGENT,
    CopyRequest,
    StreamTransfers,
    ThreadTransfer,
    ThreadTransfers,
    Transfers,
)


def make_transfers(device: torch.device, hardware: Hardware) -> Transfers:
    """Return the transfers of a device, over the host link that the hardware has or emulates."""
    if Device.of(device).has_own_memory:
        return StreamTransfers(device)
    return EmulatedTransfers(hardware) if hardware.host_link == "emulated" else ThreadTransfers(hardware)


class EmulatedTransfers(ThreadTransfers):
    """An emulated link that takes no processor, as a DMA engine: what it does when is worked out once somebody asks.

    A copy thread would have to be woken at the end of every copy, which takes milliseconds where all cores compute.
    Only weights from peers, which have to be waited for first, are left to it; of halves of them only the waiting.
    """

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(hardware)
        self._waiting: list[_Waiting] = []
        self._free_ns = 0

    def submit(self, request: CopyRequest) -> Transfer:
        """Queue a copy for the link."""
        if request.arrival is not None and request.rest is None:
            return super().submit(request)
        slot = request.slot
        self.wait(slot)
        arriving = None if request.arrival is None else self.beside(request.arrival)
        transfer, now_ns = _LinkTransfer(urgent=request.urgent, arriving=arriving), time.perf_counter_ns()
        self._go_on_until(now_ns)
        self._waiting.append(_Waiting(URGENT if request.urgent else LATER, now_ns, request, transfer))
        slot.expert_id, slot.transfer = request.expert_id, transfer
        return transfer

    def wait(self, slot: Slot) -> Span | None:
        """Sleep until the slot's copy is complete."""
        transfer = slot.transfer
        if not isinstance(transfer, _LinkTransfer):
            return super().wait(slot)
        begin = time.perf_counter_ns()
        self._go_on_until(begin)
        while transfer.span is None:  # nothing is submitted while this thread waits
            self._go_on_until(max(self._free_ns, begin))
        slot.transfer = None
        span = self._sleep_until(transfer.span[1], begin)
        return span if transfer.arriving is None else self._await_half(transfer, transfer.arriving, begin, span)

    @staticmethod
    def _await_half(transfer: Transfer, arriving: ThreadTransfer, begin: int, span: Span | None) -> Span | None:
        """Block until the half that a peer sends is there, too; return how long this thread waited for both."""
        late = not arriving.done.is_set()
        arriving.wait()
        assert transfer.span is not None
        assert arriving.span is not None
        begun, copied = transfer.span
        arrived = arriving.span[1]
        assert isinstance(copied, int)
        assert isinstance(arrived, int)
        transfer.span = begun, max(copied, arrived)
        return (begin, time.perf_counter_ns()) if late else span

    def drain(self) -> None:
        """Sleep until the link is idle."""
        super().drain()
        begin = time.perf_counter_ns()
        while self._waiting:
            self._go_on_until(max(self._free_ns, begin))
        self._sleep_until(self._free_ns, begin)

    def _go_on_until(self, now_ns: int) -> None:
        """Begin the copies that the link begins until then, each when it is free: urgent ones first, then in turn."""
        while self._waiting:
            start_ns = max(self._free_ns, min(copy.submitted_ns for copy in self._waiting))
            if start_ns > now_ns:
                return
            copy = min((copy for copy in self._waiting if copy.submitted_ns <= start_ns), key=lambda copy: copy.urgency)
            self._waiting.remove(copy)
            request = copy.request
            whole_s, rest = self.hardware.host_link_s(request.slot.expert_bytes), request.rest
            self._free_ns = start_ns + round((whole_s if rest is None else whole_s / 2) * 1e9)
            copy.transfer.span = (start_ns, self._free_ns)
            request.slot.refer(request.source if rest is None else rest)

    @staticmethod
    def _sleep_until(end_ns: Mark, now_ns: int) -> Span | None:
        assert isinstance(end_ns, int)
        if end_ns <= now_ns:
            return None
        time.sleep((end_ns - now_ns) * 1e-9)
        return now_ns, time.perf_counter_ns()


@dataclass(eq=False)
class _LinkTransfer(Transfer):
    """A copy over the emulated link; ``arriving``: the half of the weights that comes from a peer, if one does."""

    arriving: ThreadTransfer | None = None


class _Waiting(NamedTuple):
    """A copy that the emulated link has not begun."""

    urgency: int
    submitted_ns: int
    request: CopyRequest
    transfer: Transfer
