"""Moving expert weights into slots beside the computation: a copy thread on the CPU, copy streams on CUDA."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from harmoeny.hardware import Hardware
from harmoeny.runtime.device import Span
from harmoeny.runtime.memory.slots import Slot, Transfer

_URGENT, _LATER, _STOP = 0, 1, 2


class TransferEngine(ABC):
    """Loads experts into slots while computation goes on. One engine serves all systems of a rank."""

    #: What moves the weights, for the records.
    link: str

    @abstractmethod
    def submit(
        self,
        slot: Slot,
        expert_id: int,
        source: Mapping[str, Tensor],
        *,
        urgent: bool = True,
        arrival: Callable[[], object] | None = None,
    ) -> Transfer:
        """Queue a load; all computation that reads the slot's present content must have been queued.

        Args:
            slot: the slot to overwrite.
            expert_id: the expert.
            source: its weights by name.
            urgent: a fetch, which goes before all loads that are not urgent.
            arrival: waits until ``source`` itself has arrived, for weights that come from a peer.
        """

    @abstractmethod
    def wait(self, slot: Slot) -> Span | None:
        """Let computation continue only when the slot is loaded.

        Returns:
            How long it stood still for that, or None where nothing was under way.

        Raises:
            RuntimeError: the load failed.
        """

    @abstractmethod
    def used(self, slot: Slot) -> None:
        """Note that all computation queued so far may read the slot."""

    @abstractmethod
    def drain(self) -> None:
        """Block until all loads are complete."""

    def close(self) -> None:
        """Release what the engine holds; it can't be used afterwards."""
        self.drain()


def make_engine(device: torch.device, hardware: Hardware) -> TransferEngine:
    """Return the engine of a device, with the host link that the hardware has or emulates."""
    if device.type == "cuda":
        return StreamEngine(device)
    return ThreadEngine(hardware)


class ThreadEngine(TransferEngine):
    """A copy thread beside the computing thread; PyTorch's copies release the interpreter lock.

    The link is the processor's own copying (``memcpy``), or an emulated one: a DMA engine moves weights without the
    processor, so an emulated load takes the time that the link would take, asleep, and then lets the slot refer to the
    host's copy.
    """

    def __init__(self, hardware: Hardware) -> None:
        self.link = hardware.host_link
        self._hardware = hardware
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None]]] = queue.PriorityQueue()
        self._sequence = itertools.count()
        self._open: list[Transfer] = []
        self._thread = threading.Thread(target=self._work, name="expert-copies", daemon=True)
        self._thread.start()

    def submit(
        self,
        slot: Slot,
        expert_id: int,
        source: Mapping[str, Tensor],
        *,
        urgent: bool = True,
        arrival: Callable[[], object] | None = None,
    ) -> Transfer:
        """Queue a load for the copy thread."""
        self.wait(slot)
        transfer = Transfer()
        slot.expert_id, slot.transfer = expert_id, transfer
        self._open = [t for t in self._open if not t.done.is_set()]
        self._open.append(transfer)

        def job() -> None:
            try:
                begin = time.perf_counter_ns()
                if arrival is not None:
                    arrival()
                self.move(slot, source)
                transfer.span = (begin, time.perf_counter_ns())
            except BaseException as error:  # noqa: BLE001  (belongs to whoever waits)
                transfer.error = error
            finally:
                transfer.done.set()

        self._jobs.put((_URGENT if urgent else _LATER, next(self._sequence), job))
        return transfer

    def move(self, slot: Slot, source: Mapping[str, Tensor]) -> None:
        """Bring the weights into the slot; runs in the copy thread."""
        if self.link == "memcpy":
            slot.fill(source)
        else:
            time.sleep(self._hardware.host_link_s(slot.experts.expert_bytes))
            slot.refer(source)

    def wait(self, slot: Slot) -> Span | None:
        """Block this thread until the slot is loaded."""
        transfer = slot.transfer
        if transfer is None:
            return None
        span = None
        if not transfer.done.is_set():
            begin = time.perf_counter_ns()
            transfer.done.wait()
            span = (begin, time.perf_counter_ns())
        slot.transfer = None
        _raise(transfer)
        return span

    def used(self, slot: Slot) -> None:
        """Do nothing: on a CPU computation is over when it returns."""

    def drain(self) -> None:
        """Block until the copy thread has nothing left to do."""
        for transfer in self._open:
            transfer.done.wait()
        self._open = []

    def close(self) -> None:
        """Stop the copy thread after its last load."""
        self._jobs.put((_STOP, next(self._sequence), lambda: None))
        self._thread.join()

    def _work(self) -> None:
        with torch.inference_mode():
            while True:
                priority, _, job = self._jobs.get()
                if priority == _STOP:
                    return
                job()


def _raise(transfer: Transfer) -> None:
    if transfer.error is not None:
        raise RuntimeError(f"loading an expert failed: {transfer.error}") from transfer.error


class StreamEngine(TransferEngine):
    """Copy streams beside the compute stream, from pinned memory; the host never waits for the device here."""

    link = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Two streams, so that a fetch never queues behind the restores of earlier layers.
        self._fetches = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._restores = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def submit(
        self,
        slot: Slot,
        expert_id: int,
        source: Mapping[str, Tensor],
        *,
        urgent: bool = True,
        arrival: Callable[[], object] | None = None,
    ) -> Transfer:
        """Queue a load on a copy stream, behind what still reads the slot and any earlier load of it."""
        stream = self._fetches if urgent else self._restores
        if slot.last_use is not None:
            stream.wait_event(slot.last_use)
        if slot.transfer is not None and slot.transfer.span is not None:
            earlier = slot.transfer.span[1]
            assert not isinstance(earlier, int)
            stream.wait_event(earlier)
        with torch.cuda.stream(stream):
            if arrival is not None:
                arrival()
            begin = _event(stream)
            self.move(slot, source)
            transfer = Transfer(span=(begin, _event(stream)))
        slot.expert_id, slot.transfer = expert_id, transfer
        return transfer

    def move(self, slot: Slot, source: Mapping[str, Tensor]) -> None:
        """Queue the copies on the current stream."""
        slot.fill(source, non_blocking=True)

    def wait(self, slot: Slot) -> Span | None:
        """Let the compute stream wait for the load, with an event on either side of the wait."""
        transfer = slot.transfer
        if transfer is None:
            return None
        assert transfer.span is not None
        compute = torch.cuda.current_stream(self._device)
        loaded = transfer.span[1]
        assert not isinstance(loaded, int)
        begin = _event(compute)
        compute.wait_event(loaded)
        slot.transfer = None
        return (begin, _event(compute))

    def used(self, slot: Slot) -> None:
        """Put an event behind the computation queued so far."""
        slot.last_use = _event(torch.cuda.current_stream(self._device))

    def drain(self) -> None:
        """Block the host until both copy streams are empty."""
        self._fetches.synchronize()
        self._restores.synchronize()


def _event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
