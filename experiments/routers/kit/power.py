"""Popularity that falls as a power of an expert's number."""

from __future__ import annotations


def check_exponent(exponent: float) -> None:
    """Check the exponent of ``(e + 1) ** -exponent``.

    Raises:
        ValueError: an exponent outside 0 to 10.
    """
    if not 0 <= exponent <= 10:
        raise ValueError(f"router.exponent: {exponent}, must be 0 to 10")
