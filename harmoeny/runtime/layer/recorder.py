"""The one phase recorder: marks at phase boundaries while a batch runs, records made of them afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from harmoeny.plan import Plan
from harmoeny.runtime.device import Device, Mark, Span, span_s
from harmoeny.runtime.memory.fetch.base import FetchStats
from harmoeny.runtime.memory.host import HostStats


class Phase(IntEnum):
    """Phases of a MoE layer in their order; END closes the last one."""

    ROUTE = 0
    METADATA = 1
    PLAN = 2
    DISPATCH = 3
    COMPUTE = 4
    COMBINE = 5
    END = 6


PHASES = tuple(phase for phase in Phase if phase is not Phase.END)


@dataclass
class LayerMarks:
    """What one rank did in one execution of one MoE layer.

    Attributes:
        layer: MoE layer in order of execution.
        plan: the plan that was executed.
        num_assignments: assignments of this rank's tokens.
        fetch: what moving weights cost.
        padded_tokens: rows executed besides the plan's, to fill buffers of equal size.
        host: what the host executed.
        boundaries: start of every phase and the end, as the device's clock gave them.
        describe: fills in the plan and the assignments once the device is waited for; None: they are there.
    """

    layer: int
    plan: Plan | None = None
    num_assignments: int = 0
    fetch: FetchStats = field(default_factory=FetchStats)
    padded_tokens: int = 0
    host: HostStats = field(default_factory=HostStats)
    boundaries: list[Mark] = field(default_factory=list)
    describe: Callable[[], tuple[Plan, int]] | None = None


@dataclass(frozen=True)
class LayerTimes:
    """Phase boundaries of one execution of a layer, in seconds since the iteration's origin.

    Attributes:
        marks: the execution.
        boundary_s: ``[7]``, start of every phase of :data:`PHASES` and the end of the last.
        fetch_s: how long the fetches took, all together.
        fetch_wait_s: how long computation stood still for them.
        restore_s: how long the restores took, all together.
        restore_wait_s: how long computation stood still for those.
        host_s: how long the host computed.
        host_wait_s: how long computation stood still for that.
    """

    marks: LayerMarks
    boundary_s: list[float]
    fetch_s: float
    fetch_wait_s: float
    restore_s: float
    restore_wait_s: float
    host_s: float = 0.0
    host_wait_s: float = 0.0

    def phase_s(self, phase: Phase) -> float:
        """Return the length of a phase in seconds."""
        return self.boundary_s[phase + 1] - self.boundary_s[phase]

    @property
    def compute_end_s(self) -> float:
        """Return the end of this rank's own computation, in seconds since the origin."""
        return self.boundary_s[Phase.COMBINE]


class Recorder:
    """Collects marks with as little work as possible; switched off, a mark is one comparison.

    On CUDA a mark is an event on the current stream, so recording never waits for the device.

    Attributes:
        enabled: whether marks are taken.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._device = Device.of(device)
        self._now = self._device.now
        self._origin: Mark = 0
        self._layers: list[LayerMarks] = []

    def begin_iteration(self) -> None:
        """Drop the layers of earlier iterations; times count from now, on the stream that is the current one."""
        self._layers = []
        self._now = self._device.clock()
        self._origin = self._now()

    def begin_layer(self, layer: int) -> None:
        """Open a layer; its first phase, ``route``, starts now."""
        if self.enabled:
            self._layers.append(LayerMarks(layer, boundaries=[self._now()]))

    def mark(self) -> None:
        """Start the next phase of the open layer, or end its last."""
        if self.enabled:
            self._layers[-1].boundaries.append(self._now())

    def describe(
        self,
        plan: Plan,
        num_assignments: int,
        fetch: FetchStats,
        padded_tokens: int = 0,
        host: HostStats | None = None,
    ) -> None:
        """Attach what was executed to the open layer."""
        if self.enabled:
            marks = self._layers[-1]
            marks.plan, marks.num_assignments, marks.fetch = plan, num_assignments, fetch
            marks.padded_tokens, marks.host = padded_tokens, host or HostStats()

    def describe_later(self, describe: Callable[[], tuple[Plan, int]]) -> None:
        """Attach a plan that fetches nothing, and this rank's assignments, when the records are collected."""
        if self.enabled:
            self._layers[-1].describe = describe

    def collect(self) -> list[LayerTimes]:
        """Return the layers since :meth:`begin_iteration`, in order of execution; waits for the device.

        Restores that are still under way count as far as they are complete: finish the system first.
        """
        self._device.synchronize()
        for marks in self._layers:
            if marks.describe is not None:
                (marks.plan, marks.num_assignments), marks.describe = marks.describe(), None
        return [
            LayerTimes(
                marks=marks,
                boundary_s=[span_s((self._origin, mark)) for mark in marks.boundaries],
                fetch_s=_total_s(transfer.span for transfer in marks.fetch.fetches),
                fetch_wait_s=_total_s(marks.fetch.fetch_waits),
                restore_s=_total_s(transfer.span for transfer in marks.fetch.restores),
                restore_wait_s=_total_s(marks.fetch.restore_waits),
                host_s=_total_s(marks.host.busy),
                host_wait_s=_total_s(marks.host.waits),
            )
            for marks in self._layers
        ]


def _total_s(spans: Iterable[Span | None]) -> float:
    return sum((span_s(span) for span in spans if span is not None), 0.0)
