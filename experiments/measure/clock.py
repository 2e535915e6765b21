"""One clock for all ranks: the host's monotonic clock, corrected where ranks run on several hosts, and watched."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist

from harmoeny.runtime.exchange.comm import Communicator

_EXCHANGES = 15
#: How far the clock may be from the raw one after so many seconds: NTP speeds it up or slows it down by 0.5 per mille.
_TOLERANCE_S, _TOLERANCE = 1e-3, 1e-3


class ClockError(RuntimeError):
    """The clock that passes are timed with jumped meanwhile, so that their times are worth nothing."""


class RankClock:
    """This rank's monotonic clock beside rank 0's, and beside the same host's raw clock, which nobody sets."""

    def __init__(self, comm: Communicator) -> None:
        """Find out which ranks have another clock than rank 0; all ranks do it together."""
        self._comm = comm
        boots: list[str] = [""] * comm.world_size
        if comm.world_size > 1:
            dist.all_gather_object(boots, _boot_id())
        self._beside_raw = _beside_raw()
        self._apart = [rank for rank, boot in enumerate(boots) if boot != boots[0]]

    def check(self) -> None:
        """Compare what passed on this rank's clock since the last time with what passed on the raw clock.

        Raises:
            ClockError: they differ by more than clocks drift.
        """
        before, self._beside_raw = self._beside_raw, _beside_raw()
        jump_s = (self._beside_raw.own_s - before.own_s) - (self._beside_raw.raw_s - before.raw_s)
        unsure_s = before.within_s + self._beside_raw.within_s
        if abs(jump_s) > _TOLERANCE_S + unsure_s + _TOLERANCE * (self._beside_raw.raw_s - before.raw_s):
            raise ClockError(f"this rank's clock jumped by {jump_s:.3f} s while it was measured with; start again")

    def offset_s(self) -> float:
        """Return the seconds to add to this rank's clock to get rank 0's; 0 for ranks of rank 0's host.

        Uses the round trips that were shortest, as NTP does (RFC 5905, section 8). All ranks call it together.
        """
        offsets = {rank: _measure(self._comm, rank) for rank in self._apart}
        return offsets.get(self._comm.rank, 0.0)


class _BesideRaw(NamedTuple):
    """Both clocks at one moment, which is known to ``within_s``."""

    own_s: float
    raw_s: float
    within_s: float


def _beside_raw() -> _BesideRaw:
    """Read both clocks; of a few readings the one that nothing came between counts."""
    readings = []
    for _ in range(5):
        begin_s = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
        own_s = time.perf_counter()
        end_s = time.clock_gettime(time.CLOCK_MONOTONIC_RAW)
        readings.append(_BesideRaw(own_s, (begin_s + end_s) / 2, end_s - begin_s))
    return min(readings, key=lambda reading: reading.within_s)


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text() if path.exists() else ""


def _measure(comm: Communicator, rank: int) -> float:
    """Exchange the time between rank 0 and ``rank``; the result counts on ``rank`` only."""
    samples = []
    # In host memory: on a device, both would return as soon as they are queued.
    stamp = torch.zeros(1, dtype=torch.float64)
    for _ in range(_EXCHANGES):
        if comm.rank == rank:
            sent = time.perf_counter()
            dist.send(stamp, 0)
            dist.recv(stamp, 0)
            received = time.perf_counter()
            samples.append((received - sent, stamp.item() - (sent + received) / 2))
        elif comm.rank == 0:
            dist.recv(stamp, rank)
            stamp.fill_(time.perf_counter())
            dist.send(stamp, rank)
    if not samples:
        return 0.0
    shortest = sorted(samples)[:3]
    return median(offset for _, offset in shortest)
