"""One clock for all ranks: the host's monotonic clock, corrected where ranks run on several hosts."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from harmoeny.runtime.exchange.comm import Communicator

_EXCHANGES = 15


class RankClock:
    """This rank's monotonic clock beside rank 0's."""

    def __init__(self, comm: Communicator) -> None:
        """Find out which ranks have another clock than rank 0; all ranks do it together."""
        self._comm = comm
        boots: list[str] = [""] * comm.world_size
        if comm.world_size > 1:
            dist.all_gather_object(boots, _boot_id())
        self._apart = [rank for rank, boot in enumerate(boots) if boot != boots[0]]

    def offset_s(self) -> float:
        """Return the seconds to add to this rank's clock to get rank 0's; 0 for ranks of rank 0's host.

        Uses the round trips that were shortest, as NTP does (RFC 5905, section 8). All ranks call it together.
        """
        offsets = {rank: _measure(self._comm, rank) for rank in self._apart}
        return offsets.get(self._comm.rank, 0.0)


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text() if path.exists() else ""


def _measure(comm: Communicator, rank: int) -> float:
    """Exchange the time between rank 0 and ``rank``; the result counts on ``rank`` only."""
    samples = []
    stamp = torch.zeros(1, dtype=torch.float64, device=comm.device)
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
