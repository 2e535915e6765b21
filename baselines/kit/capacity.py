"""The capacity factor of policies that drop."""

from __future__ import annotations

import math


def check_capacity_factor(capacity_factor: float) -> None:
    """Refuse a multiple of the average load that nothing can be kept to.

    Raises:
        ValueError: it is not a positive, finite number.
    """
    if not (0 < capacity_factor < math.inf):
        raise ValueError(f"capacity_factor: {capacity_factor}, must be a number above 0")
