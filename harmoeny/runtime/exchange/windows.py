"""Memory that ranks write into each other, and how they wait for that: what one-sided exchange stands on."""

from __future__ import annotations

import math
import socket
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from harmoeny.runtime.device import Device


class WindowsError(RuntimeError):
    """Ranks cannot reach each other's memory, for the reason that the message gives; raised on all ranks alike."""


class PeerLostError(RuntimeError):
    """A rank that this one waits for is gone, or did not come in time; the message names it."""


class Windows(ABC):
    """The windows of one rank onto the memory of all, itself included.

    Writes and waits are in the order of the caller: on a CPU its thread's, on CUDA its current stream's.

    Attributes:
        device: where the memory is.
    """

    device: Device

    @abstractmethod
    def allocate(self, num_bytes: int) -> list[Tensor]:
        """Return, for every rank, uint8 ``[num_bytes]`` that lies with it; all ranks call it together.

        Raises:
            WindowsError: on all ranks, a rank has no room.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Wait until all ranks are here; what any of them wrote before is then there.

        Raises:
            PeerLostError: a rank did not come.
        """

    @abstractmethod
    def signal(self, rank: int) -> None:
        """Tell ``rank`` that everything written to it so far is there."""

    @abstractmethod
    def await_signal(self, rank: int, number: int) -> None:
        """Wait for a signal of ``rank``: its ``number``-th to this one, from 1; each has to be waited for just once.

        Raises:
            PeerLostError: it did not come.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; nobody writes or waits afterwards."""


def view_of(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the beginning of some memory, uint8, as another tensor."""
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def host_of() -> tuple[str, str]:
    """Return what tells this host from others, containers on it included."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return socket.gethostname(), boot.read_text() if boot.exists() else ""
