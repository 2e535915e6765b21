"""Counts by physical expert, of which an expert may have several, added up by expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from harmoeny.placement import IntArray


def logical_counts(where: str, physical: Any, physical_to_logical: Any) -> IntArray:
    """Return int64 ``[..., num_layers, num_experts]``.

    Args:
        where: file and row, for messages.
        physical: whole numbers ``[..., num_layers, num_physical]``.
        physical_to_logical: ``[num_layers, num_physical]``, the expert that every physical one is a copy of.

    Raises:
        ValueError: the two do not fit each other.
    """
    counts, experts = np.asarray(physical).astype(np.int64), np.asarray(physical_to_logical).astype(np.int64)
    if counts.shape[-2:] != experts.shape or experts.ndim != 2 or experts.min(initial=0) < 0:
        raise ValueError(
            f"{where}: counts of shape {list(counts.shape)} and a map of shape {list(experts.shape)}, must agree in "
            "layers and physical experts, and name experts from 0 on"
        )
    logical = np.zeros((*counts.shape[:-1], int(experts.max()) + 1), dtype=np.int64)
    for layer, of_layer in enumerate(experts):
        for column, expert in enumerate(of_layer):
            logical[..., layer, expert] += counts[..., layer, column]
    return logical
