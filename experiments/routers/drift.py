"""Drifting popularity: what is popular changes slowly from batch to batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.routers.base import CALIBRATION_BATCH, FloatArray, RoutingRequest, SharesRouter


@dataclass(kw_only=True)
class DriftRouter(SharesRouter):
    """Zipf's popularity over experts in a drawn order, of its own in every layer, along which it moves on.

    After ``period`` batches an expert has the share that the one before it had, and the least popular one has become
    the most popular; in between, shares change linearly. Batches for calibration are as the first one.

    Attributes:
        exponent: shares fall as this power of an expert's place in the order; 0 is uniform.
        period: batches in which popularity moves on by one expert.
    """

    name: ClassVar[str] = "drift"
    description: ClassVar[str] = "popularity that falls as a power, and moves slowly from expert to expert"

    exponent: float = 0.8
    period: float = 4.0

    def validate(self, num_experts: int, top_k: int) -> None:  # noqa: ARG002
        """Check the options.

        Raises:
            ValueError: an exponent outside 0 to 10, or no time to move on.
        """
        if not 0 <= self.exponent <= 10:
            raise ValueError(f"router.exponent: {self.exponent}, must be 0 to 10")
        if not self.period > 0:
            raise ValueError(f"router.period: {self.period}, must be above 0")

    def shares(self, request: RoutingRequest) -> FloatArray:
        """Return the shares of the batch and layer."""
        moved = (request.batch if request.batch < CALIBRATION_BATCH else 0) / self.period
        weights: FloatArray = np.arange(1, request.num_experts + 1, dtype=np.float64) ** -self.exponent
        now, whole = moved % 1, int(moved)
        weights = (1 - now) * np.roll(weights, whole) + now * np.roll(weights, whole + 1)
        seed = np.random.SeedSequence([request.seed], spawn_key=(request.model_layer,))
        shares = np.empty(request.num_experts)
        shares[np.random.default_rng(seed).permutation(request.num_experts)] = weights / weights.sum()
        return shares
