"""A fixed piece of work that no system has a part in: what changes of its time is the machine's doing."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch

from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.comm import Communicator

_REPEATS = 5


class Taken(NamedTuple):
    """How long one rank took, in s: medians of a few repetitions."""

    product_s: float
    copy_s: float


class Yardstick:
    """A product of two square matrices in FP32 and a copy within a rank's memory, some milliseconds each.

    Attributes:
        product_flops: operations of the product.
        copy_bytes: size of what is copied.
    """

    def __init__(self, comm: Communicator) -> None:
        """Make what is multiplied and copied; all ranks do it together."""
        self._comm = comm
        self._device = Device.of(comm.device)
        size, copied = (4096, 1 << 27) if self._device.has_own_memory else (512, 1 << 24)
        self._a, self._b, self._product = (torch.zeros((size, size), device=comm.device) for _ in range(3))
        self._source, self._target = (torch.zeros(copied, dtype=torch.uint8, device=comm.device) for _ in range(2))
        self.product_flops, self.copy_bytes = 2 * size**3, copied

    def measure(self) -> Taken:
        """Take the time; all ranks at the same moment, as they compute."""
        self._comm.barrier()
        return Taken(
            self._time(lambda: torch.mm(self._a, self._b, out=self._product)),
            self._time(lambda: self._target.copy_(self._source)),
        )

    def _time(self, work: Callable[[], object]) -> float:
        taken = []
        for _ in range(_REPEATS):
            begin_s = time.perf_counter()
            work()
            self._device.synchronize_compute()
            taken.append(time.perf_counter() - begin_s)
        return median(taken)
