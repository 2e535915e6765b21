"""Copies expert weights into slots beside the computation: a copy thread on the CPU, copy streams on CUDA."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harmoeny.hardware import Hardware
from harmoeny.runtime.device import Mark, Span
from harmoeny.runtime.memory.slots import Slot, Transfer

#: What goes first in a queue of copies: fetches, what halved ones wait for, restores.
URGENT, _ARRIVING, LATER, _STOP = 0, 1, 2, 3


@dataclass(frozen=True)
class CopyRequest:
    """A copy of one expert's weights into a slot.

    Attributes:
        slot: the slot to overwrite; all computation that reads its present content must have been queued.
        expert_id: the expert.
        source: its weights by name.
        urgent: a fetch, which goes before all copies that are not urgent.
        arrival: waits until ``source`` itself is complete, where a peer sends it.
        rest: the weights in host memory, where ``source`` has only the first half of each and the others are copied
            from there; only with ``arrival``.
    """

    slot: Slot
    expert_id: int
    source: Mapping[str, Tensor]
    urgent: bool = True
    arrival: Callable[[], object] | None = None
    rest: Mapping[str, Tensor] | None = None


class Transfers(ABC):
    """Copies experts into slots while computation goes on; all systems of a rank share it."""

    #: What the weights travel over, for the records.
    link: str
    #: Whether weights are copied into the slots' own memory; otherwise slots refer to them where they are.
    fills_slots = True

    @abstractmethod
    def submit(self, request: CopyRequest) -> Transfer:
        """Queue a copy."""

    @abstractmethod
    def beside(self, work: Callable[[], None]) -> Any:
        """Queue other work beside computation, before the fetches that are submitted later.

        Returns:
            What is to be waited for with ``wait()``; that raises what went wrong.
        """

    @abstractmethod
    def wait(self, slot: Slot) -> Span | None:
        """Let computation go on only when the slot's copy is complete.

        Returns:
            How long computation stood still for that, or None where no copy was under way.

        Raises:
            RuntimeError: the copy failed.
        """

    def go_on(self) -> None:  # noqa: B027  (only where copies are queued by the host)
        """Begin a copy that is not urgent, if its turn has come; the host calls it often, since nobody else does."""

    @abstractmethod
    def drain(self) -> None:
        """Block until all copies are complete."""

    def close(self) -> None:
        """Finish all copies and release threads and streams; nothing can be submitted afterwards."""
        self.drain()


@dataclass(eq=False)
class ThreadTransfer(Transfer):
    """A copy in the queue of the copy thread.

    Attributes:
        done: set when the thread has finished it, with an error or without.
        error: what went wrong.
    """

    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None

    def wait(self) -> None:
        """Block until it is done."""
        self.done.wait()
        if self.error is not None:
            raise RuntimeError(f"copying an expert failed: {self.error}") from self.error


class ThreadTransfers(Transfers):
    """A copy thread beside the computing thread; PyTorch's copies release the interpreter lock.

    The link is the processor's own copying (``memcpy``), or an emulated one: then a copy sleeps for as long as the link
    would take, and lets the slot refer to the host's weights.
    """

    def __init__(self, hardware: Hardware) -> None:
        self.link = hardware.host_link
        self.fills_slots = self.link == "memcpy"
        self.hardware = hardware
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._sequence = itertools.count()
        self._open: list[ThreadTransfer] = []
        self._thread = threading.Thread(target=self._work, name="expert-copies", daemon=True)
        self._thread.start()

    def submit(self, request: CopyRequest) -> Transfer:
        """Queue a copy for the copy thread."""
        slot, rest = request.slot, request.rest
        self.wait(slot)

        def copy() -> None:
            if request.arrival is not None:
                request.arrival()
            if rest is None:
                self.move(slot, request.source)
            elif self.fills_slots:
                slot.fill_first(request.source)
            else:
                slot.refer(rest)

        if rest is None:
            transfer = self._queue(copy, urgent=request.urgent)
        else:
            host = self._queue(lambda: self.move_rest(slot, rest), urgent=True)
            transfer = self._queue(copy, urgent=True, behind=host)
        slot.expert_id, slot.transfer = request.expert_id, transfer
        return transfer

    def beside(self, work: Callable[[], object]) -> ThreadTransfer:
        """Queue work for the copy thread."""
        return self._queue(work, urgent=True)

    def _queue(
        self, work: Callable[[], object], *, urgent: bool, behind: ThreadTransfer | None = None
    ) -> ThreadTransfer:
        """Queue work; ``behind``: the other half of it, which was queued before and has to be done."""
        transfer = ThreadTransfer(urgent=urgent)
        self._open = [t for t in self._open if not t.done.is_set()]
        self._open.append(transfer)

        def job() -> None:
            try:
                begin: Mark = time.perf_counter_ns()
                if behind is not None:
                    behind.wait()
                    assert behind.span is not None
                    begin = behind.span[0]
                work()
                transfer.span = (begin, time.perf_counter_ns())
            except BaseException as error:  # noqa: BLE001  (raised where the copy is waited for)
                transfer.error = error
            finally:
                transfer.done.set()

        # Whatever is to be copied from host memory need not wait for what peers send.
        first = URGENT if urgent else LATER
        self._jobs.put((first if behind is None else _ARRIVING, next(self._sequence), job))
        return transfer

    def move(self, slot: Slot, source: Mapping[str, Tensor]) -> None:
        """Copy the weights into the slot; runs in the copy thread."""
        if self.fills_slots:
            slot.fill(source)
        else:
            time.sleep(self.hardware.host_link_s(slot.expert_bytes))
            slot.refer(source)

    def move_rest(self, slot: Slot, rest: Mapping[str, Tensor]) -> None:
        """Copy the second half of the weights into the slot; runs in the copy thread."""
        if self.fills_slots:
            slot.fill_rest(rest)
        else:
            time.sleep(self.hardware.host_link_s(slot.expert_bytes) / 2)

    def wait(self, slot: Slot) -> Span | None:
        """Block this thread until the slot's copy is complete."""
        transfer = slot.transfer
        if transfer is None:
            return None
        assert isinstance(transfer, ThreadTransfer), "the slot belongs to other transfers"
        span = None
        if not transfer.done.is_set():
            begin = time.perf_counter_ns()
            transfer.done.wait()
            span = (begin, time.perf_counter_ns())
        slot.transfer = None
        transfer.wait()
        return span

    def drain(self) -> None:
        """Block until the copy thread is idle."""
        for transfer in self._open:
            transfer.done.wait()
        self._open = []

    def close(self) -> None:
        """Stop the copy thread after its last copy."""
        self._jobs.put((_STOP, next(self._sequence), lambda: None))
        self._thread.join()

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                priority, _, job = self._jobs.get()
                if priority == _STOP:
                    return
                job()


class _Copy(NamedTuple):
    """A copy before it is queued.

    Attributes:
        request: what to copy.
        transfer: the copy.
        after: behind the computation that it may not overtake.
        earlier: the copy into the same slot that it may not overtake either; None: it is over.
    """

    request: CopyRequest
    transfer: Transfer
    after: torch.cuda.Event
    earlier: Transfer | None


class StreamTransfers(Transfers):
    """Copy streams beside the compute stream, from pinned memory; the host never waits for the device here."""

    link = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Two streams, so that a fetch never queues behind the restores of earlier layers. What is queued on either goes
        # to the same copy engine, whatever the streams' priorities: hence never more than one restore is. A third, so
        # that no fetch queues behind halves that peers still send.
        self._fetches = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._restores = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arrivals = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._waiting: deque[_Copy] = deque()
        self._restored: torch.cuda.Event | None = None

    def submit(self, request: CopyRequest) -> Transfer:
        """Queue a copy on a stream, behind all computation queued so far and any earlier copy into the slot.

        So a copy that is submitted when its expert's turn comes overlaps with nothing, and one that is submitted as
        soon as its slot is free waits for no more than what used the slot last.
        """
        transfer, slot = Transfer(urgent=request.urgent), request.slot
        # What is copied over needs no restore.
        self._waiting = deque(copy for copy in self._waiting if copy.request.slot is not slot)
        copy = _Copy(request, transfer, _event(torch.cuda.current_stream(self._device)), slot.transfer)
        slot.expert_id, slot.transfer = request.expert_id, transfer
        if request.urgent:
            self._queue(copy, self._fetches)
        else:
            self._waiting.append(copy)
        self.go_on()
        return transfer

    def _queue(self, copy: _Copy, stream: torch.cuda.Stream) -> None:
        request, transfer = copy.request, copy.transfer
        stream.wait_event(copy.after)
        if copy.earlier is not None and copy.earlier.span is not None:
            stream.wait_event(_end(copy.earlier))
        if request.rest is not None:
            transfer.span = self._queue_halves(request, request.rest, stream)
            return
        with torch.cuda.stream(stream):
            if request.arrival is not None:
                request.arrival()
            begin = _event(stream)
            self.move(request.slot, request.source)
            transfer.span = (begin, _event(stream))

    def _queue_halves(self, request: CopyRequest, rest: Mapping[str, Tensor], stream: torch.cuda.Stream) -> Span:
        """Queue the half from host memory, and behind it the other."""
        assert request.arrival is not None, "no peer sends the other half"
        with torch.cuda.stream(stream):
            begin = _event(stream)
            self.move_rest(request.slot, rest)
        self._arrivals.wait_event(_event(stream))
        with torch.cuda.stream(self._arrivals):
            request.arrival()
            self.move_first(request.slot, request.source)
        return begin, _event(self._arrivals)

    def go_on(self) -> None:
        """Queue the next restore, unless one is under way."""
        if self._waiting and (self._restored is None or self._restored.query()):  # type: ignore[no-untyped-call]
            self._restore(self._waiting.popleft())

    def _restore(self, copy: _Copy) -> None:
        self._queue(copy, self._restores)
        self._restored = _end(copy.transfer)

    def beside(self, work: Callable[[], None]) -> Any:
        """Queue work on the stream of the fetches, behind what the compute stream has to do now."""
        self._fetches.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._fetches):
            work()
        return self._fetches.record_event()

    def move(self, slot: Slot, source: Mapping[str, Tensor]) -> None:
        """Queue the copies on the current stream."""
        slot.fill(source, non_blocking=True)

    def move_rest(self, slot: Slot, rest: Mapping[str, Tensor]) -> None:
        """Queue the copies of the second halves on the current stream."""
        slot.fill_rest(rest, non_blocking=True)

    def move_first(self, slot: Slot, source: Mapping[str, Tensor]) -> None:
        """Queue the copies of the first halves on the current stream."""
        slot.fill_first(source, non_blocking=True)

    def wait(self, slot: Slot) -> Span | None:
        """Let the compute stream wait for the copy, with an event on either side of the wait."""
        self.go_on()
        transfer = slot.transfer
        if transfer is None:
            return None
        for copy in [copy for copy in self._waiting if copy.transfer is transfer]:
            self._waiting.remove(copy)  # nobody can go on without it now
            self._restore(copy)
        compute = torch.cuda.current_stream(self._device)
        begin = _event(compute)
        compute.wait_event(_end(transfer))
        slot.transfer = None
        return (begin, _event(compute))

    def drain(self) -> None:
        """Block the host until both copy streams are empty, and no restore waits."""
        while self._waiting:
            self._restore(self._waiting.popleft())
        self._fetches.synchronize()
        self._arrivals.synchronize()
        self._restores.synchronize()


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _end(transfer: Transfer) -> torch.cuda.Event:
    """Return the event behind a copy that was queued."""
    assert transfer.span is not None
    assert isinstance(transfer.span[1], torch.cuda.Event)
    return transfer.span[1]
