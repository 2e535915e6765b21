"""Windows between CUDA devices of one host, or ranks on the same one: PyTorch's symmetric memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.exchange.windows import Windows, WindowsError, host_of

T = TypeVar("T")
#: Barriers take the first channel of a signal pad, signals the others in turn.
_BARRIER, _FIRST_SIGNAL = 0, 1
_PAD_BYTES = 4


class SymmetricWindows(Windows):
    """Memory that the devices map into each other; waiting is a kernel on the current stream, never the host's.

    Ranks on one device need ``TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1``, and kernels that run at the same time.
    """

    def __init__(self, comm: Communicator) -> None:
        """Map what the ranks wait on; all ranks do it together.

        Args:
            comm: finds the ranks; the default process group is theirs too.

        Raises:
            WindowsError: the ranks run on several hosts, or PyTorch or the driver cannot share memory between them.
        """
        self.device = Device.of(comm.device)
        self._comm, self._timeout_ms = comm, int(comm.timeout_s * 1000)
        if (num_hosts := len(set(comm.gather_objects(host_of())))) > 1:
            raise WindowsError(f"the ranks run on {num_hosts} hosts")
        # PyTorch gives freed memory out again, with the signal pad that lies with it: as long as this is kept, nobody
        # else waits on the same pad.
        self._pad, self._handle = self._rendezvous(1, f"PyTorch {torch.__version__} has no symmetric memory here")
        self._num_channels = int(self._handle.signal_pad_size) // _PAD_BYTES // comm.world_size - _FIRST_SIGNAL
        self._sent = [0] * comm.world_size

    def allocate(self, num_bytes: int) -> list[Tensor]:
        """Allocate on every device and map it on all."""
        otherwise = f"{num_bytes / 2**30:.2g} GiB on the device of every rank, for what they exchange: no room"
        own, handle = self._rendezvous(num_bytes, otherwise)
        ranks = range(self._comm.world_size)
        others = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in ranks]
        return [own if rank == self._comm.rank else others[rank] for rank in ranks]

    def barrier(self) -> None:
        """Queue a barrier on the current stream."""
        self._handle.barrier(channel=_BARRIER, timeout_ms=self._timeout_ms)

    def signal(self, rank: int) -> None:
        """Queue a signal; it waits where all channels are in use."""
        self._sent[rank] += 1
        self._handle.put_signal(rank, channel=self._channel(self._sent[rank]), timeout_ms=self._timeout_ms)

    def await_signal(self, rank: int, number: int) -> None:
        """Queue a wait, which takes the signal."""
        self._handle.wait_signal(rank, channel=self._channel(number), timeout_ms=self._timeout_ms)

    def close(self) -> None:
        """Let the device finish; memory goes with the last tensor."""
        self.device.synchronize()

    def _channel(self, number: int) -> int:
        return _FIRST_SIGNAL + number % self._num_channels

    def _rendezvous(self, num_bytes: int, otherwise: str) -> tuple[Tensor, Any]:
        """Allocate and exchange addresses; on all ranks alike it works or not; ``otherwise`` is what is said then."""
        device = self._comm.device
        # Apart, since a rank without memory must not leave the others waiting for its address.
        own = self._on_all(lambda symmetric: symmetric.empty(num_bytes, dtype=torch.uint8, device=device), otherwise)
        return own, self._on_all(lambda symmetric: symmetric.rendezvous(own, _everyone()), otherwise)

    def _on_all(self, make: Callable[[Any], T], otherwise: str) -> T:
        """Return what PyTorch's symmetric memory makes, once all ranks have theirs.

        Raises:
            WindowsError: on all ranks, one has none.
        """
        made: list[T] = []
        problem = ""
        try:
            import torch.distributed._symmetric_memory as symmetric

            made.append(make(symmetric))
        except (ImportError, AttributeError, RuntimeError) as error:
            problem = f"{otherwise} ({str(error).partition(chr(10))[0]})"
        problems = [p for p in self._comm.gather_objects(problem) if p]
        if problems:
            raise WindowsError(problems[0])
        return made[0]


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "several ranks have a process group"
    return group
