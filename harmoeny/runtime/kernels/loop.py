"""One expert after another: the reference, and the fastest way on a CPU."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from harmoeny.choices import KernelName
from harmoeny.runtime.kernels.base import Kernel, Results
from harmoeny.runtime.memory.waves import Wave


class LoopKernel(Kernel):
    """Applies the layer's own function to every slice; works for any function, wherever the weights are."""

    name = KernelName.LOOP
    grouped: ClassVar[bool] = False

    def __call__(self, wave: Wave, rows_RH: Tensor, results: Results) -> None:
        """Compute the slices in turn."""
        for slot, start, num_tokens in zip(wave.slots, wave.starts, wave.num_tokens, strict=True):
            part = slice(start, start + num_tokens)
            self.slots.experts.function(self.slots.slots[slot].weights, rows_RH[part], results.room(part))
