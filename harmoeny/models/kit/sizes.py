"""Checks of the sizes that models are built with."""

from __future__ import annotations


def require_positive(prefix: str, **values: int) -> None:
    """Refuse sizes below 1.

    Raises:
        ValueError: the first size that is too small, named ``<prefix>.<name>``.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{prefix}.{name}: {value}, must be at least 1")
