"""Executes experts on a rank's host, from the store, beside its device: a thread of its own, streams on CUDA."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from harmoeny.hardware import Hardware
from harmoeny.runtime.device import Device, Span
from harmoeny.runtime.memory.experts import LayerExperts
from harmoeny.runtime.memory.waves import HostSlice


@dataclass
class HostStats:
    """What a rank's host executed in one layer, and the stall that it caused.

    Attributes:
        num_tokens: rows that it executed.
        activation_bytes: size of these rows on their way to the host, and of their results on the way back.
        busy: when it computed.
        waits: when computation on the device stood still for the results.
    """

    num_tokens: int = 0
    activation_bytes: int = 0
    busy: list[Span] = field(default_factory=list)
    waits: list[Span] = field(default_factory=list)


class Host(ABC):
    """The processor of a rank's host, which executes slices beside the rank's device; all systems of a rank share it.

    For a layer :meth:`start` is called when the rows are on the device, before any of its waves, and :meth:`finish`
    behind the last of them.
    """

    def __init__(self, num_threads: int) -> None:
        """Start nothing yet.

        Args:
            num_threads: threads that compute, at least 1.
        """
        self._stats = HostStats()
        self._worker = ThreadPoolExecutor(
            1, thread_name_prefix="host-experts", initializer=torch.set_num_threads, initargs=(num_threads,)
        )

    @abstractmethod
    def start(self, experts: LayerExperts, slices: Sequence[HostSlice], rows_RH: Tensor, out_RH: Tensor) -> None:
        """Begin to execute slices, at least one.

        Args:
            experts: the layer.
            slices: what to execute, in this order.
            rows_RH: ``[R, H]`` on the device, the rows of the whole schedule.
            out_RH: ``[R, H]`` on the device, takes the results; nobody else writes the slices' rows.
        """

    @abstractmethod
    def finish(self) -> HostStats:
        """Let computation on the device go on only when the results are there.

        Raises:
            Exception: whatever went wrong on the host.
        """

    def close(self) -> None:
        """Stop the thread; nothing may be under way."""
        self._worker.shutdown()

    def _begin_stats(self, slices: Sequence[HostSlice], rows_RH: Tensor) -> None:
        num_tokens = sum(part.num_tokens for part in slices)
        self._stats = HostStats(num_tokens, 2 * num_tokens * rows_RH.shape[1] * rows_RH.element_size())


def make_host(device: torch.device, hardware: Hardware, num_threads: int) -> Host:
    """Return what executes experts on the host of a device, with so many threads."""
    if Device.of(device).has_own_memory:
        return StreamHost(device, num_threads)
    return ThreadHost(hardware, num_threads)


class ThreadHost(Host):
    """A second thread plays the host where the processor is the device.

    Rows take the time of an emulated link there and back, asleep, and stay where they are meanwhile; over ``memcpy``
    they are copied.
    """

    def __init__(self, hardware: Hardware, num_threads: int) -> None:
        super().__init__(num_threads)
        self._hardware = hardware
        self._job: Future[Span]

    def start(self, experts: LayerExperts, slices: Sequence[HostSlice], rows_RH: Tensor, out_RH: Tensor) -> None:
        """Hand the slices to the thread."""
        self._begin_stats(slices, rows_RH)
        self._job = self._worker.submit(self._execute, experts, slices, rows_RH, out_RH)

    def finish(self) -> HostStats:
        """Block until the thread is done."""
        begin, waited = time.perf_counter_ns(), not self._job.done()
        self._stats.busy.append(self._job.result())
        if waited:
            self._stats.waits.append((begin, time.perf_counter_ns()))
        return self._stats

    @torch.inference_mode()
    def _execute(
        self, experts: LayerExperts, slices: Sequence[HostSlice], rows_RH: Tensor, out_RH: Tensor
    ) -> tuple[int, int]:
        """Execute the slices; return when that began and ended."""
        emulated = self._hardware.host_link == "emulated"
        one_way_s = self._hardware.host_link_s(self._stats.activation_bytes / 2) if emulated else 0.0
        time.sleep(one_way_s)
        sources = [rows_RH[part.rows] if emulated else rows_RH[part.rows].clone() for part in slices]
        begin = time.perf_counter_ns()
        for part, rows in zip(slices, sources, strict=True):
            out = out_RH[part.rows] if emulated else torch.empty_like(rows)
            experts.function(experts.expert(part.expert_id), rows, out)
            if not emulated:
                out_RH[part.rows] = out
        end = time.perf_counter_ns()
        time.sleep(one_way_s)
        return begin, end


class _OnDevice(NamedTuple):
    """What the host made: when it computed, and the event behind which its results are on the device."""

    busy: Span
    arrived: torch.cuda.Event


class StreamHost(Host):
    """The processor beside a CUDA device: rows travel through pinned memory, on streams of their own both ways.

    So they never queue behind weights (Huang et al., arXiv 2512.16473).
    """

    def __init__(self, device: torch.device, num_threads: int) -> None:
        super().__init__(num_threads)
        self._device = device
        self._down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._job: Future[_OnDevice]

    def start(self, experts: LayerExperts, slices: Sequence[HostSlice], rows_RH: Tensor, out_RH: Tensor) -> None:
        """Queue the rows' way to the host behind what made them, and let the thread wait for them."""
        self._begin_stats(slices, rows_RH)
        compute = torch.cuda.current_stream(self._device)
        for stream, rows in ((self._down, rows_RH), (self._up, out_RH)):
            stream.wait_stream(compute)
            rows.record_stream(stream)
        with torch.cuda.stream(self._down):
            sources = [_pinned(rows_RH[part.rows]) for part in slices]
            for part, source in zip(slices, sources, strict=True):
                source.copy_(rows_RH[part.rows], non_blocking=True)
            there = self._down.record_event()
        self._job = self._worker.submit(self._execute, experts, slices, sources, there, out_RH)

    def finish(self) -> HostStats:
        """Block the host until the thread has queued the results' way back, and let the device wait for that."""
        made = self._job.result()
        compute = torch.cuda.current_stream(self._device)
        begin = compute.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        compute.wait_event(made.arrived)
        end = compute.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._stats.busy.append(made.busy)
        self._stats.waits.append((begin, end))
        return self._stats

    @torch.inference_mode()
    def _execute(
        self,
        experts: LayerExperts,
        slices: Sequence[HostSlice],
        sources: Sequence[Tensor],
        there: torch.cuda.Event,
        out_RH: Tensor,
    ) -> _OnDevice:
        there.synchronize()
        begin = time.perf_counter_ns()
        results = [_pinned(rows) for rows in sources]
        for part, rows, result in zip(slices, sources, results, strict=True):
            experts.function(experts.expert(part.expert_id), rows, result)
        end = time.perf_counter_ns()
        with torch.cuda.stream(self._up):
            for part, result in zip(slices, results, strict=True):
                out_RH[part.rows].copy_(result, non_blocking=True)
            return _OnDevice((begin, end), self._up.record_event())


def _pinned(rows: Tensor) -> Tensor:
    return torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
