"""Hot experts: shares with skew towards a few experts, and which of them exist."""

from __future__ import annotations

import numpy as np

from experiments.routers.base import FloatArray
from harmoeny.placement import IntArray


def hot_shares(skew: float, hot: IntArray, num_experts: int) -> FloatArray:
    """Return float64 ``[num_experts]``, the shares with ``skew`` on the experts ``hot``."""
    shares = np.full(num_experts, (1 - skew) / num_experts)
    shares[hot] += skew / len(hot)
    return shares


def number_of_hot(num_hot: int | None, top_k: int) -> int:
    """Return how many experts are hot: as many as a token has, unless it is said."""
    return top_k if num_hot is None else num_hot


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
