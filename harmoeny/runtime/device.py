"""What the runtime asks of a kind of device: its clock, how to wait for it, its process groups, its memory."""

from __future__ import annotations

import ctypes
import platform
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")
_PROCESS = Path("/proc/self")
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

    #: What PyTorch calls the process groups of ranks with such devices; objects travel over gloo.
    process_group: ClassVar[str]
    #: False where device memory is host memory; otherwise weights are copied from pinned host memory.
    has_own_memory: ClassVar[bool]
    #: Whether a process may be forked from one that may have used such a device.
    survives_fork: ClassVar[bool]

    @staticmethod
    @cache
    def of(device: torch.device) -> Device:
        """Return the device; what is not CUDA computes when it is called, as the CPU does."""
        return CudaDevice(device) if device.type == "cuda" else CpuDevice()

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the processor or GPU."""

    @property
    def num_multiprocessors(self) -> int | None:
        """The streaming multiprocessors that this process may use; None where there is no such thing."""
        return None

    @property
    @abstractmethod
    def num_here(self) -> int | None:
        """Devices of this kind on this host, one for every rank; None: ranks share them as they like."""

    @abstractmethod
    def with_peak_bytes(self, function: Callable[[], T]) -> tuple[T, int | None]:
        """Call a function and measure its memory; that costs time, so nothing is timed together with this.

        Returns:
            The function's result, and the peak of this rank's memory above that at the call's beginning, in bytes, or
            None where the system does not tell.
        """

    @abstractmethod
    def upload(self, values: NDArray[np.integer[Any]]) -> Tensor:
        """Return the values as a tensor on the device; the host does not wait for what the device has left to do."""

    @abstractmethod
    def download(self, values: Tensor) -> Callable[[], NDArray[Any]]:
        """Start to copy a tensor on the device to the host; what is returned waits for that, and for nothing later."""

    @abstractmethod
    def beside(self) -> AbstractContextManager[None]:
        """Let what is called within begin behind what was called before, and what is called afterwards not wait for it.

        Whoever reads what came of it, or gives its memory away, waits for it first, as :meth:`download` lets the host.
        """

    @abstractmethod
    def now(self) -> Mark:
        """Return the time at which all computation called so far is over, without waiting for it."""

    def clock(self) -> Callable[[], Mark]:
        """Return :meth:`now` for whoever stays on the current stream: to look it up takes longer than an event does."""
        return self.now

    def follow(self, mark: Mark) -> None:
        """Let what is called from now on begin after a mark; where computation is over when it returns, it does."""
        del mark

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
    survives_fork: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """What Linux calls the processor, else what Python knows of it."""
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            for line in cpuinfo.read_text().splitlines():
                if line.startswith("model name"):
                    return "CPU " + line.split(":", 1)[1].strip()
        return "CPU " + (platform.processor() or platform.machine())

    @property
    def num_here(self) -> None:
        """None: ranks share the cores."""

    def with_peak_bytes(self, function: Callable[[], T]) -> tuple[T, int | None]:
        """Measure what the process has resident; free memory that the C library caches is released first."""
        try:
            ctypes.CDLL(None).malloc_trim(0)
            (_PROCESS / "clear_refs").write_text("5")  # the peak becomes what is resident now
            before = _resident_peak_bytes()
        except (AttributeError, OSError):  # another C library, or no Linux
            return function(), None
        result = function()
        return result, _resident_peak_bytes() - before

    def upload(self, values: NDArray[np.integer[Any]]) -> Tensor:
        """Return a tensor that shares the array's memory."""
        return torch.from_numpy(values)

    def download(self, values: Tensor) -> Callable[[], NDArray[Any]]:
        """Return what copies it, so that it may be written again."""
        return lambda: np.array(values.numpy())

    def beside(self) -> AbstractContextManager[None]:
        """Do nothing: computation is over when its call returns."""
        return nullcontext()

    def now(self) -> Mark:
        """Return the processor's clock in nanoseconds."""
        return time.perf_counter_ns()

    def synchronize(self) -> None:
        """Do nothing."""

    def synchronize_compute(self) -> None:
        """Do nothing."""


class CudaDevice(Device):
    """A CUDA device, which computes behind the host on its current stream."""

    process_group: ClassVar[str] = "cpu:gloo,cuda:nccl"
    has_own_memory: ClassVar[bool] = True
    survives_fork: ClassVar[bool] = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def name(self) -> str:
        """The GPU's name."""
        return torch.cuda.get_device_name(self._device)

    @property
    def num_multiprocessors(self) -> int:
        """As the driver says: under MPS, of this process's share."""
        return int(torch.cuda.get_device_properties(self._device).multi_processor_count)

    @property
    def num_here(self) -> int:
        """The GPUs that PyTorch sees."""
        return torch.cuda.device_count()

    def with_peak_bytes(self, function: Callable[[], T]) -> tuple[T, int | None]:
        """Measure what PyTorch's allocator gave out."""
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        result = function()
        return result, int(torch.cuda.max_memory_allocated(self._device)) - before

    def upload(self, values: NDArray[np.integer[Any]]) -> Tensor:
        """Queue a copy from pinned memory on the current stream; from memory that is not pinned the host would wait."""
        return torch.from_numpy(values).pin_memory().to(self._device, non_blocking=True)

    def download(self, values: Tensor) -> Callable[[], NDArray[Any]]:
        """Queue a copy into pinned memory on the current stream, and an event behind it."""
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(self._device))

        def wait() -> NDArray[Any]:
            copied.synchronize()
            return host.numpy()

        return wait

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Make a stream the current one that waits for what the current one has to do now."""
        side = self._side
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            yield

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def now(self) -> Mark:
        """Return an event on the current stream."""
        return self.clock()()

    def clock(self) -> Callable[[], Mark]:
        """Return what makes events on the stream that is the current one now."""
        stream = torch.cuda.current_stream(self._device)

        def now() -> Mark:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(stream)
            return event

        return now

    def follow(self, mark: Mark) -> None:
        """Let the current stream wait for an event."""
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(mark)

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(self._device)

    def synchronize_compute(self) -> None:
        """Wait for the current stream."""
        torch.cuda.current_stream(self._device).synchronize()


def _resident_peak_bytes() -> int:
    match = re.search(r"^VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text(encoding="ascii"), re.MULTILINE)
    if match is None:
        raise OSError(f"{_PROCESS}/status: no VmHWM")
    return int(match[1]) * 1024


def best_device_type() -> str:
    """Return ``cuda`` where PyTorch sees such a device, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def gpu_names() -> list[str]:
    """Return the names of the GPUs that PyTorch sees."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def choose_device(device_type: str, local_rank: int, ranks_per_device: int = 1) -> torch.device:
    """Return the device of a rank and make it the current one.

    Args:
        device_type: ``cpu`` or ``cuda``.
        local_rank: the rank's number on its host. A launcher may show every rank only its own device, as number 0.
        ranks_per_device: ranks that share one.
    """
    if device_type != "cuda":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank // ranks_per_device if torch.cuda.device_count() > 1 else 0)
    torch.cuda.set_device(device)
    return device
