"""Changing skew: every batch draws its own skew and its own hot experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.routers.base import FloatArray, RoutingRequest, SharesRouter
from experiments.routers.kit.hot import check_hot, check_skew, hot_shares, number_of_hot


@dataclass(kw_only=True)
class DynamicRouter(SharesRouter):
    """Skew and hot experts drawn anew for every batch, the same for all its layers and ranks.

    Attributes:
        min_skew: least skew drawn.
        max_skew: largest skew drawn.
        num_hot: number of hot experts; null: as many as a token has experts.
    """

    name: ClassVar[str] = "dynamic"
    description: ClassVar[str] = "skew and hot experts drawn anew for every batch"

    min_skew: float = 0.0
    max_skew: float = 0.95
    num_hot: int | None = 1

    def validate(self, num_experts: int, top_k: int) -> None:
        """Check the range of the skew.

        Raises:
            ValueError: a skew or num_hot that num_experts and top_k do not allow, or an empty range.
        """
        num_hot = number_of_hot(self.num_hot, top_k)
        check_hot(num_hot, num_experts)
        check_skew("min_skew", self.min_skew, num_hot, top_k)
        check_skew("max_skew", self.max_skew, num_hot, top_k)
        if self.min_skew > self.max_skew:
            raise ValueError(f"router.min_skew: {self.min_skew}, must be at most router.max_skew={self.max_skew}")

    def shares(self, request: RoutingRequest) -> FloatArray:
        """Return the shares for the batch's own skew."""
        rng = request.batch_generator()
        skew = float(rng.uniform(self.min_skew, self.max_skew))
        hot = rng.choice(request.num_experts, size=number_of_hot(self.num_hot, request.top_k), replace=False)
        return hot_shares(skew, hot, request.num_experts)
