"""Windows between the ranks of one host on a CPU: files in RAM that all ranks map, and counters to wait for."""

from __future__ import annotations

import fcntl
import os
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from harmoeny.compiled import compiled
from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.exchange.windows import PeerLostError, Windows, WindowsError, host_of

FOLDER = Path("/dev/shm")  # noqa: S108  (the point is that it is shared)
#: int64 counters that share no cache line.
_STRIDE = 8
#: Looks before a waiting rank gives its core away, and how long it only does that. Then it sleeps between looks, for a
#: share of the time that it has waited, which is as much as a wait can become too long.
_LOOKS = 50
_YIELDING_S = 2e-4
_SLEEP_SHARE, _SHORTEST_SLEEP_S, _LONGEST_SLEEP_S = 0.05, 5e-5, 1e-3
#: Between two looks whether those that are waited for still live.
_LIFE_S = 0.2
#: ``struct flock``: type, whence, start, length, process.
_LOCK = struct.Struct("hhqqi4x")


class SharedWindows(Windows):
    """Files in /dev/shm that have no name: the others open them as a descriptor of the rank that made them.

    So their memory is freed when the last rank ends, however and whenever it ends.
    """

    def __init__(self, comm: Communicator) -> None:
        """Map what the ranks wait on; all ranks do it together.

        Args:
            comm: finds the ranks.

        Raises:
            WindowsError: the ranks run on several hosts, or cannot share memory.
        """
        self.device = Device.of(comm.device)
        self._comm, self._timeout_s = comm, comm.timeout_s
        if (num_hosts := len(set(comm.gather_objects(host_of())))) > 1:
            raise WindowsError(f"the ranks run on {num_hosts} hosts")
        num_ranks = comm.world_size
        shape = (1 + num_ranks, num_ranks, _STRIDE)
        memory, self._descriptor = self._map_everywhere(int(np.prod(shape)) * 8, of_rank=0)
        #: ``[0, r]``: barriers that rank r came to; ``[1 + r, s]``: signals of rank s to rank r.
        self._counters: IntArray = memory.view(torch.int64).view(shape).numpy()[:, :, 0]
        _lock(self._descriptor, comm.rank)
        self._barriers = 0
        comm.gather_objects(None)  # all locks are there before anybody looks for one

    def allocate(self, num_bytes: int) -> list[Tensor]:
        """Create a file per rank, which its own rank touches first."""
        windows = []
        for rank in range(self._comm.world_size):
            memory, descriptor = self._map_everywhere(num_bytes, of_rank=rank)
            os.close(descriptor)
            windows.append(memory)
        return windows

    def barrier(self) -> None:
        """Count up, and wait for all others to have done so."""
        self._barriers += 1
        _publish(self._counters[0], self._comm.rank, self._barriers)
        self._wait(self._counters[0], self._barriers, lambda late: late)

    def signal(self, rank: int) -> None:
        """Count up for that rank."""
        signals = self._counters[1 + rank]
        _publish(signals, self._comm.rank, int(signals[self._comm.rank]) + 1)

    def await_signal(self, rank: int, number: int) -> None:
        """Wait until that rank has counted so far."""
        self._wait(self._counters[1 + self._comm.rank, rank : rank + 1], number, lambda _: [rank])

    def close(self) -> None:
        """Give up the lock by which others see that this rank lives; mapped memory goes with the last tensor."""
        os.close(self._descriptor)

    def _wait(self, counters: IntArray, target: int, who: Callable[[list[int]], list[int]]) -> None:
        """Wait until all counters have reached ``target``; whom a late one stands for, ``who`` says."""
        if _all_reach(counters, target, _LOOKS):
            return
        begin = next_life = time.monotonic()
        while not _all_reach(counters, target, _LOOKS):
            now = time.monotonic()
            if now - begin < _YIELDING_S:
                os.sched_yield()
                continue
            # Whatever else this core has to do is done meanwhile, such as this rank's copies.
            time.sleep(min(max(_SLEEP_SHARE * (now - begin), _SHORTEST_SLEEP_S), _LONGEST_SLEEP_S))
            if now < next_life:
                continue
            next_life = now + _LIFE_S
            late = who(np.flatnonzero(counters < target).tolist())
            gone = [rank for rank in late if not _lives(self._descriptor, rank)]
            if gone and not _all_reach(counters, target, _LOOKS):  # it may have come, and ended after that
                raise PeerLostError(f"rank {gone[0]} is gone")
            if now - begin > self._timeout_s:
                raise PeerLostError(f"rank {late[0]} kept this one waiting: timed out after {self._timeout_s:g} s")

    def _map_everywhere(self, num_bytes: int, of_rank: int) -> tuple[Tensor, int]:
        """Map a new file of ``of_rank`` on all ranks, which call it together; return it and an open descriptor."""
        with ExitStack() as held:
            own = _created(num_bytes, held) if self._comm.rank == of_rank else None
            file = self._comm.gather_objects(own)[of_rank] or _File()
            mapped, problem = (None, file.problem) if file.problem else _map(file, num_bytes)
            problems = [p for p in self._comm.gather_objects(problem) if p]
        if mapped is None or problems:
            if mapped is not None:
                os.close(mapped[1])
            raise WindowsError(problems[0])
        return mapped


class _File(NamedTuple):
    """A file as other processes of the host find it, or what went wrong."""

    path: str = ""
    identity: tuple[int, int] = (0, 0)
    problem: str = ""


def _created(num_bytes: int, held: ExitStack) -> _File:
    """Create a file with room for that much; others find it as long as ``held`` keeps it open."""
    try:
        unnamed = tempfile.TemporaryFile(dir=FOLDER)  # noqa: SIM115  (``held`` closes it)
        descriptor = held.enter_context(unnamed).fileno()
        os.posix_fallocate(descriptor, 0, num_bytes)  # on a full disk this raises, a write would be killed
    except OSError as error:
        return _File(problem=f"{num_bytes / 2**20:.0f} MiB do not go into {FOLDER} ({error.strerror})")
    return _File(f"/proc/{os.getpid()}/fd/{descriptor}", _identity(descriptor))


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _map(file: _File, num_bytes: int) -> tuple[tuple[Tensor, int] | None, str]:
    """Map a file, and return it with an open descriptor, or what went wrong."""
    try:
        descriptor = os.open(file.path, os.O_RDWR)
        if _identity(descriptor) != file.identity:  # in another container the same number is another process
            os.close(descriptor)
            return None, f"{file.path} is another file for one rank than for the other"
        storage: Any = torch.UntypedStorage.from_file(file.path, shared=True, nbytes=num_bytes)
    except (OSError, RuntimeError) as error:
        return None, f"a rank cannot map memory of another ({error})"
    return (torch.empty(0, dtype=torch.uint8).set_(storage), descriptor), ""


def _lock(descriptor: int, rank: int) -> None:
    """Hold a lock on the byte of this rank, which ends with the process, whichever way that ends."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, rank, 1, 0))


def _lives(descriptor: int, rank: int) -> bool:
    asked = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, rank, 1, 0)
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked)
    return bool(_LOCK.unpack(answer)[0] != fcntl.F_UNLCK)


@intrinsic  # type: ignore[untyped-decorator]
def _fence(_: Any) -> Any:
    """Order all reads and writes before it and after it, for other processors too."""

    def generate(context: Any, builder: ir.IRBuilder, _signature: Any, _arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def _publish(counters: IntArray, index: int, value: int) -> None:
    """Set a counter after everything that was written before."""
    _fence()
    counters[index] = value


@compiled
def _all_reach(counters: IntArray, target: int, looks: int) -> bool:
    """Look so often whether all counters have reached ``target``; what was written before them is there then."""
    for _ in range(looks):
        _fence()  # also makes the compiler read the counters anew
        late = False
        for counter in counters:
            late |= counter < target
        if not late:
            _fence()
            return True
    return False
