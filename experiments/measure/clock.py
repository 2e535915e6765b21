"""One clock for all ranks: the host's monotonic clock, corrected where ranks run on several hosts."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from harmoeny.runtime.exchange.comm import Communicator

_EXCHANGES = 15


def clock_offset_s(comm: Communicator) -> float:
    """Return the seconds to add to this rank's monotonic clock to get rank 0's; 0 for ranks of one host.

    Uses the round trip that was shortest, as NTP does (RFC 5905, section 8).
    """
    if comm.world_size == 1:
        return 0.0
    boots: list[str] = [""] * comm.world_size
    dist.all_gather_object(boots, _boot_id())
    offset = 0.0
    for rank in range(1, comm.world_size):
        if boots[rank] != boots[0]:
            measured = _measure(comm, rank)
            offset = measured if rank == comm.rank else offset
    return offset


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
