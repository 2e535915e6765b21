"""What the runtime asks of a kind of device: its clock, how to wait for it, its process groups, its memory."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from functools import cache
from typing import ClassVar

import torch

#: A point in time: nanoseconds of the processor's clock (int), seconds of a virtual clock (float), or a CUDA event.
Mark = int | float | torch.cuda.Event
#: Begin and end, both of one kind.
Span = tuple[Mark, Mark]


def span_s(span: Span) -> float:
    """Return the length of a span in seconds; CUDA events must be complete."""
    begin, end = span
    if isinstance(begin, int):
        assert isinstance(end, int)
        return (end - begin) * 1e-9
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert not isinstance(end, (int, float))
    return float(begin.elapsed_time(end)) * 1e-3


class Device(ABC):
    """One device that a rank computes on; :meth:`of` gives that of a ``torch.device``."""

    #: What PyTorch calls the process groups of such devices.
    process_group: ClassVar[str]
    #: False where device memory is host memory; otherwise weights are copied from pinned host memory.
    has_own_memory: ClassVar[bool]

    @staticmethod
    @cache
    def of(device: torch.device) -> Device:
        """Return the device; what is not CUDA computes when it is called, as the CPU does."""
        return CudaDevice(device) if device.type == "cuda" else CpuDevice()

    @abstractmethod
    def now(self) -> Mark:
        """Return the time at which all computation called so far is over, without waiting for it."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block until the device has nothing left to do."""

    @abstractmethod
    def synchronize_compute(self) -> None:
        """Block until all computation called so far is over; copies on other streams may go on."""


class CpuDevice(Device):
    """The processor: computation is over when the call returns, so there is nothing to wait for."""

    process_group: ClassVar[str] = "gloo"
    has_own_memory: ClassVar[bool] = False

    def now(self) -> Mark:
        """Return the processor's clock in nanoseconds."""
        return time.perf_counter_ns()

    def synchronize(self) -> None:
        """Do nothing."""

    def synchronize_compute(self) -> None:
        """Do nothing."""


class CudaDevice(Device):
    """A CUDA device, which computes behind the host on its current stream."""

    process_group: ClassVar[str] = "nccl"
    has_own_memory: ClassVar[bool] = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Mark:
        """Return an event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(self._device)

    def synchronize_compute(self) -> None:
        """Wait for the current stream."""
        torch.cuda.current_stream(self._device).synchronize()


def best_device_type() -> str:
    """Return ``cuda`` where PyTorch sees such a device, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_device(device_type: str, local_rank: int) -> torch.device:
    """Return the device of a rank and make it the current one.

    Args:
        device_type: ``cpu`` or ``cuda``.
        local_rank: the rank's number on its host. A launcher may show every rank only its own device, as number 0.
    """
    if device_type != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank if torch.cuda.device_count() > 1 else 0)
    torch.cuda.set_device(device)
    return device
