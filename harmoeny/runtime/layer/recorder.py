"""The one phase recorder: marks at phase boundaries while a batch runs, records made of them afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from harmoeny.plan import Plan
from harmoeny.runtime.device import Device, Mark, Span, span_s
from harmoeny.runtime.memory.fetch.base import FetchStats


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
class LayerTrace:
    """What one rank did in one execution of one MoE layer.

    Attributes:
        layer: MoE layer in order of execution.
        plan: the plan that was executed.
        num_assignments: assignments of this rank's tokens.
        fetch: what moving weights cost.
        padded_tokens: rows executed besides the plan's, to fill buffers of equal size.
        marks: start of every phase and the end, as the clock gave them.
    """

    layer: int
    plan: Plan | None = None
    num_assignments: int = 0
    fetch: FetchStats = field(default_factory=FetchStats)
    padded_tokens: int = 0
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class LayerTimes:
    """Phase boundaries of one execution of a layer, in seconds since the iteration's origin.

    Attributes:
        trace: the execution.
        boundary_s: ``[7]``, start of every phase of :data:`PHASES` and the end of the last.
        fetch_s: how long the fetches took, all together.
        fetch_wait_s: how long computation stood still for them.
        restore_s: how long the restores took, all together.
        restore_wait_s: how long computation stood still for those.
    """

    trace: LayerTrace
    boundary_s: list[float]
    fetch_s: float
    fetch_wait_s: float
    restore_s: float
    restore_wait_s: float

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
        self._origin: Mark = 0
        self._traces: list[LayerTrace] = []

    def begin_iteration(self) -> None:
        """Forget earlier layers and set the origin of time."""
        self._traces = []
        self._origin = self._device.now()

    def begin_layer(self, layer: int) -> None:
        """Open a layer; its first phase, ``route``, starts now."""
        if self.enabled:
            self._traces.append(LayerTrace(layer, marks=[self._device.now()]))

    def mark(self) -> None:
        """Start the next phase of the open layer, or end its last."""
        if self.enabled:
            self._traces[-1].marks.append(self._device.now())

    def describe(self, plan: Plan, num_assignments: int, fetch: FetchStats, padded_tokens: int = 0) -> None:
        """Attach what was executed to the open layer."""
        if self.enabled:
            trace = self._traces[-1]
            trace.plan, trace.num_assignments, trace.fetch = plan, num_assignments, fetch
            trace.padded_tokens = padded_tokens

    def collect(self) -> list[LayerTimes]:
        """Return the layers since :meth:`begin_iteration`, in order of execution; waits for the device.

        Restores that are still under way count as far as they are complete: finish the system's loads first.
        """
        self._device.synchronize()
        return [
            LayerTimes(
                trace=t,
                boundary_s=[span_s((self._origin, mark)) for mark in t.marks],
                fetch_s=_total_s(transfer.span for transfer in t.fetch.fetches),
                fetch_wait_s=_total_s(t.fetch.fetch_waits),
                restore_s=_total_s(transfer.span for transfer in t.fetch.restores),
                restore_wait_s=_total_s(t.fetch.restore_waits),
            )
            for t in self._traces
        ]


def _total_s(spans: Iterable[Span | None]) -> float:
    return sum((span_s(span) for span in spans if span is not None), 0.0)
