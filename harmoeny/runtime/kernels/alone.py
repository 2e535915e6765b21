"""Slices so large that a matrix product of their own is faster than their part of a grouped one.

A grouped product cuts slices of all sizes into the same tiles and walks through them in one order, which few large
slices beside many small ones do not suit. Measured on a quarter of an H100 (results/gpu): eight of 38 slices with nine
tenths of the rows take 1.2 times as long in one grouped product as they do as products of their own, beside a grouped
one of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A tile of a large matrix product.
_TILE_ROWS, _TILE_COLUMNS = 128, 256
#: What does not fill the device so many times over wastes too much of it at the end.
_LEAST_FILLINGS = 4
#: The grouped product that is left must be the smaller part: it is of Triton, which is slower than PyTorch's.
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Alone:
    """What of the rows of a grouped product is multiplied slot by slot.

    Attributes:
        parts: such slots and their rows.
        least_rows: as many rows as a slot must have for that.
    """

    parts: Sequence[tuple[int, slice]] = ()
    least_rows: int = 2**31 - 1

    @property
    def num_rows(self) -> int:
        """All rows of such slots."""
        return sum(part.stop - part.start for _, part in self.parts)


NOTHING_ALONE = Alone()


def least_rows_alone(num_multiprocessors: int, num_out: int) -> int:
    """Return how many rows a slice must have to fill a device often enough.

    Args:
        num_multiprocessors: of the device.
        num_out: columns of the results.
    """
    tiles = _LEAST_FILLINGS * num_multiprocessors
    return _TILE_ROWS * -(-tiles // -(-num_out // _TILE_COLUMNS))


def find_alone(tokens_S: NDArray[np.integer[Any]], least_rows: int) -> Alone:
    """Return the slots of a wave that are multiplied for themselves.

    Args:
        tokens_S: int ``[num_slots]``, rows of every slot, which lie by slot.
        least_rows: as of :func:`least_rows_alone`.
    """
    total = int(tokens_S.sum())
    if total < least_rows:
        return NOTHING_ALONE
    large = (tokens_S >= least_rows).nonzero()[0].tolist()
    ends = tokens_S.cumsum()
    alone = Alone([(slot, slice(int(ends[slot] - tokens_S[slot]), int(ends[slot]))) for slot in large], least_rows)
    return alone if alone.num_rows >= max(1, _LEAST_SHARE * total) else NOTHING_ALONE
