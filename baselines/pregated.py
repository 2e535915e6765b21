"""Pre-gated MoE: the experts of the next layer are fetched while a layer computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.ahead import PrefetchingCache
from baselines.kit.cache import filled_with
from harmoeny.placement import BoolArray, IntArray, Placement, hold_fetched, hold_highest
from harmoeny.plan import home_executed


@dataclass(kw_only=True)
class PreGated(PrefetchingCache):
    """Pre-gated MoE (Hwang et al., ISCA 2024, arXiv 2308.12066): a layer's gate chooses the next layer's experts.

    As many experts as the layer has active are predicted to be needed next, and copied into the next layer's slots
    behind this one's work, those expected to have most assignments first. What the gate then wants beside them is
    fetched on demand, and so is all of the first layer.
    """

    name: ClassVar[str] = "pregated"
    description: ClassVar[str] = "fetches the experts that the next layer is predicted to need while a layer computes"

    def on_host(self, executed: IntArray, placement: Placement) -> BoolArray:  # noqa: ARG002  (nothing is)
        """Return nothing: all is executed on devices."""
        return np.zeros_like(placement.resident)

    def look_ahead(self, layer: int, counts: IntArray, following: Placement) -> Placement | None:
        """Fill the next layer's slots with what it is predicted to need.

        Args:
            layer: the layer that was planned.
            counts: int64 ``[world_size, num_experts]``, its counts.
            following: the present residency of the next layer.
        """
        expected = self.expected(layer, counts)
        if self.num_slots is None or expected is None:
            return None
        wanted = following.at_home & (expected > 0)[:, None]
        return filled_with(hold_highest(expected, wanted, self.num_slots), following, self.num_slots)

    def retain(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:  # noqa: ARG002
        """Keep what is there: the slots are filled anew before the layer's next batch."""
        if self.num_slots is None:
            return None
        executed = home_executed(history[-1], placement)
        shares = history[-1].sum(axis=0) / max(int(history[-1].sum()), 1)
        fetched = (executed > 0) & ~placement.resident
        return placement.with_residents(hold_fetched(shares, fetched, placement, self.num_slots))
