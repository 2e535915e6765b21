"""On demand: a rank fetches what it lacks when it needs it, and keeps what it had last. The floor of all caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.cache import CachePolicy, recency
from harmoeny.placement import BoolArray, IntArray, Placement, hold_highest


@dataclass(kw_only=True)
class OnDemand(CachePolicy):
    """Every expert is executed on its home rank's device, which fetches those that are in no slot.

    What a rank used last stays, so that nothing is copied but what is needed. Within a batch those with the most tokens
    are used first, as the runtime executes them.
    """

    name: ClassVar[str] = "on_demand"
    description: ClassVar[str] = "fetches the experts that are in no slot, and keeps those that it used last"

    def on_host(self, executed: IntArray, placement: Placement) -> BoolArray:  # noqa: ARG002  (nothing is)
        """Return nothing: all is executed on devices."""
        return np.zeros_like(placement.resident)

    def retain(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:  # noqa: ARG002
        """Keep what every rank used last."""
        if self.num_slots is None:
            return None
        scores = recency(history, placement, most_last=False)
        return placement.with_residents(hold_highest(scores, placement.at_home, self.num_slots))
