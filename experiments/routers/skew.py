"""Synthetic skew: a share of all assignments goes to a few hot experts, the rest evenly to all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.routers.base import FloatArray, RoutingRequest, SharesRouter
from harmoeny.placement import IntArray


@dataclass(kw_only=True)
class SkewRouter(SharesRouter):
    """Constant skew towards experts 0 to ``num_hot - 1``.

    Attributes:
        skew: share of the assignments that goes to the hot experts, before the rest is dealt evenly to all experts (the
            hot ones too), so that 0 is uniform and 1 leaves the others without work.
        num_hot: number of hot experts.
    """

    name: ClassVar[str] = "skew"
    description: ClassVar[str] = "a share of the assignments goes to a few hot experts, the rest evenly to all"

    skew: float = 0.0
    num_hot: int = 1

    def validate(self, num_experts: int, top_k: int) -> None:
        """Check that the shares exist for this layer.

        Raises:
            ValueError: skew or num_hot outside what num_experts and top_k allow.
        """
        check_hot(self.num_hot, num_experts)
        check_skew("skew", self.skew, self.num_hot, top_k)

    def shares(self, request: RoutingRequest) -> FloatArray:
        """Return the shares."""
        return hot_shares(self.skew, np.arange(self.num_hot), request.num_experts)


def hot_shares(skew: float, hot: IntArray, num_experts: int) -> FloatArray:
    """Return float64 ``[num_experts]``, the shares with ``skew`` on the experts ``hot``."""
    shares = np.full(num_experts, (1 - skew) / num_experts)
    shares[hot] += skew / len(hot)
    return shares


def check_hot(num_hot: int, num_experts: int) -> None:
    """Refuse a number of hot experts that the layer does not have.

    Raises:
        ValueError: num_hot below 1 or above num_experts.
    """
    if not 1 <= num_hot <= num_experts:
        raise ValueError(f"router.num_hot: {num_hot}, must be 1 to model.num_experts={num_experts}")


def check_skew(field: str, skew: float, num_hot: int, top_k: int) -> None:
    """Refuse a share that is none, or that the hot experts cannot take: each takes a token at most once.

    Raises:
        ValueError: a skew outside 0 to 1, or above num_hot / top_k.
    """
    if not 0 <= skew <= 1:
        raise ValueError(f"router.{field}: {skew}, must be 0 to 1")
    if skew > num_hot / top_k:
        raise ValueError(
            f"router.{field}: {skew}, must be at most {num_hot / top_k:g}: with model.top_k={top_k} a token goes to "
            f"{top_k} different experts, and only router.num_hot={num_hot} are hot"
        )
