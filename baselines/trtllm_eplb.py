"""TensorRT-LLM's online expert load balancer: smoothed statistics, and in every batch a few layers placed anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.replicas import FloatArray, ReplicatingPolicy
from harmoeny.packing import copies_by_load, longest_first
from harmoeny.placement import IntArray, Placement

#: Batches that weigh less than this in the smoothed statistics are forgotten.
_FORGOTTEN = 1e-3


@dataclass(kw_only=True)
class TRTLLMEPLB(ReplicatingPolicy):
    """The online balancer of TensorRT-LLM (runtime/moeLoadBalancer), which refills slots from host memory.

    An expert's load is its counts, each batch weighing ``decay`` times the next. Copies go one by one to the expert
    whose copies carry most, and by falling share to the least loaded rank.

    Attributes:
        decay: weight of a batch over that of the next one.
        interval: every so many batches a layer has its turn; layers follow each other, so in every batch it is the
            turn of one in ``interval``.
    """

    name: ClassVar[str] = "trtllm_eplb"
    description: ClassVar[str] = "TensorRT-LLM's online EPLB: smoothed statistics, a few layers re-placed per batch"

    decay: float = 0.9
    interval: int = 4

    @property
    def history_window(self) -> int:
        """Batches that weigh anything."""
        return math.ceil(math.log(_FORGOTTEN) / math.log(self.decay)) if 0 < self.decay < 1 else 1

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a decay that is none, or a number that is too small.
        """
        super().validate()
        self._at_least(interval=1)
        if not 0 <= self.decay <= 0.99:
            raise ValueError(f"decay: {self.decay}, must be between 0 and 0.99")

    def is_due(self, layer: int, num_batches: int) -> bool:
        """Return whether it is the layer's turn."""
        return (num_batches - 1 - layer) % self.interval == 0

    def expected_load(self, history: Sequence[IntArray]) -> FloatArray:
        """Return float64 ``[num_experts]``, the smoothed counts."""
        load = np.zeros(history[-1].shape[1])
        for counts in history[-self.history_window :]:
            load = load * self.decay + counts.sum(axis=0)
        return load

    def rearranged(self, load: IntArray | FloatArray, placement: Placement, num_slots: int) -> Placement:
        """Return new copies for the load."""
        load = load.astype(np.float64)
        copies = copies_by_load(load, num_slots * placement.world_size, placement.world_size)
        resident, _ = longest_first(load, copies, placement.world_size, num_slots)
        return Placement(home=resident.argmax(axis=1), resident=resident)
