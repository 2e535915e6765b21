"""Where rows lie when ranks put them into each other's memory: pure numbers, the same on all ranks.

Shape letters: E experts, D destinations, S sources, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmoeny.placement import IntArray
from harmoeny.runtime.exchange.order import exclusive_cumsum, is_ascending


def rows_as_sent(sent_EW: IntArray) -> IntArray:
    """Return int64 ``[E, W]``, the first row of every block, in the order in which they are sent.

    Args:
        sent_EW: int64 ``[E, W]``, how many of a rank's assignments of every expert go to every rank.
    """
    return exclusive_cumsum(sent_EW.T.reshape(-1)).reshape(sent_EW.T.shape).T


def send_blocks(sent_EW: IntArray, starts_EW: IntArray, bases: Sequence[int], row_bytes: int) -> IntArray:
    """Return int64 ``[3, E, W]``, what :func:`~harmoeny.runtime.exchange.fused.put_tokens` must know of the blocks.

    Args:
        sent_EW: int64 ``[E, W]``, how many of a rank's assignments of every expert go to every rank.
        starts_EW: int64 ``[E, W]``, the first row of every block where it goes to.
        bases: by rank, the address of row 0 there.
        row_bytes: bytes of a row.
    """
    firsts_EW = exclusive_cumsum(sent_EW, axis=1)
    addresses_EW = (starts_EW - firsts_EW) * row_bytes + bases
    return np.stack([firsts_EW + sent_EW, rows_as_sent(sent_EW) - firsts_EW, addresses_EW])


@dataclass(frozen=True)
class Layout:
    """The rows of one layer, as one of the ranks sees them.

    Attributes:
        rank: the rank.
        sent_EW: int64 ``[E, W]``, how many rows of every expert it sends to every rank.
        lengths_DES: int64 ``[D, E, S]``, rows of every block, in the order in which they lie at their destination.
        starts_DES: int64 ``[D, E, S]``, first row of every block there.
        returns_ES: int64 ``[E, S]``, where every source wants the results of its blocks on this rank: results come back
            by (destination, expert), as rows were sent.
        order: the experts with rows for this rank, in the order in which it wants their rows; None: as they arrive. No
            other rank knows it.
    """

    rank: int
    sent_EW: IntArray
    lengths_DES: IntArray
    starts_DES: IntArray
    returns_ES: IntArray
    order: Sequence[int] | None

    @classmethod
    def of(cls, tokens_WEW: IntArray, rank: int, order: Sequence[int] | None = None) -> Layout:
        """Lay rows out.

        Args:
            tokens_WEW: int64 ``[W, E, W]``, how many rows of every source and expert go to every destination.
            rank: this rank.
            order: as :meth:`~harmoeny.runtime.exchange.comm.Communicator.send_rows` takes it.
        """
        lengths_DES = tokens_WEW.transpose(2, 1, 0)
        starts_DES = exclusive_cumsum(lengths_DES.reshape(len(tokens_WEW), -1), axis=1).reshape(lengths_DES.shape)
        begins_S = exclusive_cumsum(lengths_DES.sum(axis=1), axis=0)[rank]
        returns_ES: IntArray = begins_S + exclusive_cumsum(lengths_DES[rank], axis=0)
        if is_ascending(order):
            order = None
        return cls(rank, tokens_WEW[rank], lengths_DES, starts_DES, returns_ES, order)

    @property
    def num_sent(self) -> int:
        """The rows that this rank sends."""
        return int(self.sent_EW.sum())

    @property
    def num_received(self) -> int:
        """The rows that this rank receives."""
        return int(self.lengths_DES[self.rank].sum())

    def in_order(self, values: IntArray) -> IntArray:
        """Return what is given of every expert in the order in which this rank wants experts."""
        return values if self.order is None else values[self.order]
