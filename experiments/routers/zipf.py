"""Zipf routing: the popularity of experts falls as a power of their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.routers.base import FloatArray, RoutingRequest, SharesRouter
from experiments.routers.kit.power import check_exponent


@dataclass(kw_only=True)
class ZipfRouter(SharesRouter):
    """Expert e gets a share in proportion to ``(e + 1) ** -exponent``.

    Attributes:
        exponent: 0 is uniform; 1 is Zipf's law.
    """

    name: ClassVar[str] = "zipf"
    description: ClassVar[str] = "popularity falls as a power of the expert's number"

    exponent: float = 1.0

    def validate(self, num_experts: int, top_k: int) -> None:  # noqa: ARG002
        """Check the exponent.

        Raises:
            ValueError: an exponent outside 0 to 10.
        """
        check_exponent(self.exponent)

    def shares(self, request: RoutingRequest) -> FloatArray:
        """Return the shares."""
        weights: FloatArray = np.arange(1, request.num_experts + 1, dtype=np.float64) ** -self.exponent
        shares: FloatArray = weights / weights.sum()
        return shares
