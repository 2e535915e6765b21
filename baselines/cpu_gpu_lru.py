"""CPU-GPU collaborative inference with an expert cache (Huang et al.): a miss is computed on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.cache import CachePolicy, recency
from harmoeny.placement import BoolArray, IntArray, Placement, hold_highest


@dataclass(kw_only=True)
class CpuGpuLru(CachePolicy):
    """A set-associative LRU cache of experts (Huang et al., ASP-DAC 2026, arXiv 2512.16473).

    Every layer is a set with ``num_slots`` ways, or the first layers are and the others have no cache. A hit is
    executed on the device, a miss on the host; its weights follow afterwards, behind the layers that come next.

    Attributes:
        indexes: layers, from the first on, that have a cache: the authors have N = slots / M of them, where M ways each
            have room; null: all.
    """

    name: ClassVar[str] = "cpu_gpu_lru"
    description: ClassVar[str] = "an LRU cache of experts; what it misses is executed on the host, and copied in later"

    indexes: int | None = None

    @property
    def needs_host(self) -> bool:
        """True."""
        return True

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a number of layers below 0.
        """
        super().validate()
        if self.indexes is not None and self.indexes < 0:
            raise ValueError(f"indexes: {self.indexes}, must be at least 0, or null for all layers")

    def place(self, layer: int, num_experts: int, world_size: int) -> Placement:
        """Return the first experts of every rank; none in layers without a cache."""
        placement = super().place(layer, num_experts, world_size)
        if self._has_cache(layer):
            return placement
        return Placement(placement.home, np.zeros_like(placement.resident))

    def on_host(self, executed: IntArray, placement: Placement) -> BoolArray:
        """Return all misses."""
        return (executed > 0) & ~placement.resident

    def retain(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:
        """Keep what every rank used last, misses too; within a batch, popular experts are taken to be used last."""
        if self.num_slots is None or not self._has_cache(layer):
            return None
        scores = recency(history, placement, most_last=True)
        return placement.with_residents(hold_highest(scores, placement.at_home, self.num_slots))

    def _has_cache(self, layer: int) -> bool:
        return self.indexes is None or layer < self.indexes
