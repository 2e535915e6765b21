"""Counts that name only experts that were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from harmoeny.placement import IntArray


def dense(rows: Mapping[str, Any], num_experts: int | None) -> IntArray:
    """Return int64 ``[num_layers, num_experts]``.

    Args:
        rows: by file and layer, for messages, the assignments of every expert that has any: whole numbers by an
            expert's number, which may be text.
        num_experts: None: one more than the highest that is named.

    Raises:
        ValueError: something else than whole numbers of at least 0, or an expert that there is not.
    """
    parsed = {where: _checked(where, row) for where, row in rows.items()}
    width = num_experts or max((max(row, default=0) for row in parsed.values()), default=0) + 1
    counts = np.zeros((len(parsed), width), dtype=np.int64)
    for layer, (where, row) in enumerate(parsed.items()):
        for expert, count in row.items():
            if expert >= width:
                raise ValueError(f"{where}: expert {expert}, must be below {width} (--num-experts)")
            counts[layer, expert] = count
    return counts


def _checked(where: str, row: Any) -> dict[int, int]:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: {type(row).__name__}, must be assignments by expert")
    counts: dict[int, int] = {}
    for key, value in row.items():
        try:
            expert, count = int(key), int(value)
        except (TypeError, ValueError):
            expert, count = -1, -1
        if expert < 0 or count < 0 or count != value:
            raise ValueError(f"{where}: expert {key!r} has {value!r}, must be whole numbers of at least 0")
        counts[expert] = count
    return counts
