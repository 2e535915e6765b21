"""Synthetic skew: a share of all assignments goes to a few hot experts, the rest evenly to all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.routers.base import FloatArray, RoutingRequest, SharesRouter
from experiments.routers.kit.hot import check_hot, check_skew, hot_shares, number_of_hot


@dataclass(kw_only=True)
class SkewRouter(SharesRouter):
    """Constant skew towards experts 0 to ``num_hot - 1``.

    Attributes:
        skew: share of the assignments that goes to the hot experts, before the rest is dealt evenly to all experts (the
            hot ones too), so that 0 is uniform and 1 leaves the others without work.
        num_hot: number of hot experts; null: as many as a token has experts.
    """

    name: ClassVar[str] = "skew"
    description: ClassVar[str] = "a share of the assignments goes to a few hot experts, the rest evenly to all"

    skew: float = 0.0
    num_hot: int | None = 1

    def validate(self, num_experts: int, top_k: int) -> None:
        """Check that the shares exist for this layer.

        Raises:
            ValueError: skew or num_hot outside what num_experts and top_k allow.
        """
        num_hot = number_of_hot(self.num_hot, top_k)
        check_hot(num_hot, num_experts)
        check_skew("skew", self.skew, num_hot, top_k)

    def shares(self, request: RoutingRequest) -> FloatArray:
        """Return the shares."""
        hot = np.arange(number_of_hot(self.num_hot, request.top_k))
        return hot_shares(self.skew, hot, request.num_experts)
