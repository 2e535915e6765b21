"""Where rows lie when ranks put them into each other's memory: pure numbers, the same on all ranks.

Shape letters: E experts, S sources, D destinations, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from harmoeny.compiled import compiled
from harmoeny.placement import BoolArray, IntArray
from harmoeny.runtime.exchange.order import Expected, exclusive_cumsum

_ASCENDING = np.empty((0, 0), dtype=np.int64)


@dataclass(frozen=True)
class Layout:
    """The rows of one layer, as one of the ranks sees them.

    Rows arrive by expert and source; first come the experts that a rank holds, by slot where others know its slots,
    then those that it fetches, from the one with the most rows on: so a rank that executes all that it holds and then
    what it fetches has them in its own order.
    Results come back by destination and expert.

    Attributes:
        rank: the rank.
        sent_EW: int64 ``[E, W]``, rows of every expert that the rank sends to every rank.
        starts_EW: int64 ``[E, W]``, the first of them there.
        received_ES: int64 ``[E, S]``, rows of every expert and source that arrive here.
        arrived_ES: int64 ``[E, S]``, the first of them.
        returns_ES: int64 ``[E, S]``, the first of their results at the source.
        received_D: int64 ``[W]``, all rows that arrive at every rank.
        sent_S: int64 ``[W]``, all rows that every rank sends.
        order: the experts with rows here, in the order in which the rank wants them; None: ascending.
        regroups: whether that, which no other rank knows, is not the order in which they arrive.
    """

    rank: int
    sent_EW: IntArray
    starts_EW: IntArray
    received_ES: IntArray
    arrived_ES: IntArray
    returns_ES: IntArray
    received_D: IntArray
    sent_S: IntArray
    order: Sequence[int] | None
    regroups: bool

    @classmethod
    def of(
        cls,
        tokens_WEW: IntArray,
        rank: int,
        order: Sequence[int] | None = None,
        expected: Expected | None = None,
    ) -> Layout:
        """Lay rows out.

        Args:
            tokens_WEW: int64 ``[W, E, W]``, how many rows of every source and expert go to every destination.
            rank: this rank.
            order: as :meth:`~harmoeny.runtime.exchange.comm.Communicator.send_rows` takes it.
            expected: likewise.
        """
        tokens_WEW = np.ascontiguousarray(tokens_WEW)
        last_EW = np.zeros(tokens_WEW.shape[1:], np.bool_) if expected is None else expected.fetched_EW
        held_DE = _ASCENDING if expected is None or expected.held_WE is None else expected.held_WE
        experts_DE = _by_arrival(tokens_WEW, np.ascontiguousarray(last_EW), held_DE)
        blocks, totals = _lay_out(tokens_WEW, experts_DE, rank)
        sent_EW, starts_EW, received_ES, arrived_ES, returns_ES = blocks
        received_D, sent_S = totals
        arriving = experts_DE[rank][received_ES.any(axis=1)[experts_DE[rank]]].tolist()
        ascending = sorted(arriving)
        wanted = ascending if order is None else list(order)
        return cls(
            rank, sent_EW, starts_EW, received_ES, arrived_ES, returns_ES, received_D, sent_S,
            order=None if wanted == ascending else wanted, regroups=wanted != arriving,
        )  # fmt: skip

    @property
    def num_sent(self) -> int:
        """The rows that this rank sends."""
        return int(self.sent_S[self.rank])

    @property
    def num_received(self) -> int:
        """The rows that this rank receives."""
        return int(self.received_D[self.rank])

    def in_order(self, values: IntArray) -> IntArray:
        """Return what is given of every expert in the order in which this rank wants experts."""
        return values if self.order is None else values[self.order]


def rows_as_sent(sent_EW: IntArray) -> IntArray:
    """Return int64 ``[E, W]``, the first row of every block, in the order in which they are sent.

    Args:
        sent_EW: int64 ``[E, W]``, how many of a rank's assignments of every expert go to every rank.
    """
    starts_WE = exclusive_cumsum(sent_EW.T.reshape(-1)).reshape(sent_EW.T.shape)
    return np.ascontiguousarray(starts_WE.T)


@compiled
def send_blocks(sent_EW: IntArray, starts_EW: IntArray, bases_W: IntArray, row_bytes: int) -> IntArray:
    """Return int64 ``[3, E, W]``, what :func:`~harmoeny.runtime.exchange.fused.put_tokens` must know of the blocks.

    Args:
        sent_EW: int64 ``[E, W]``, how many of a rank's assignments of every expert go to every rank.
        starts_EW: int64 ``[E, W]``, the first row of every block where it goes to.
        bases_W: int64 ``[W]``, the address of row 0 there.
        row_bytes: bytes of a row.
    """
    num_experts, num_ranks = sent_EW.shape
    blocks = np.empty((3, num_experts, num_ranks), np.int64)
    row = 0
    number_E = np.zeros(num_experts, np.int64)
    for rank in range(num_ranks):
        for expert in range(num_experts):
            first = number_E[expert]
            number_E[expert] += sent_EW[expert, rank]
            blocks[0, expert, rank] = number_E[expert]
            blocks[1, expert, rank] = row - first
            blocks[2, expert, rank] = bases_W[rank] + (starts_EW[expert, rank] - first) * row_bytes
            row += sent_EW[expert, rank]
    return blocks


@compiled
def return_blocks(received_ES: IntArray, returns_ES: IntArray, bases_S: IntArray, row_bytes: int) -> IntArray:
    """Return int64 ``[3, B]``, what :func:`~harmoeny.runtime.exchange.fused.put_rows` must know to bring results back.

    Args:
        received_ES: int64 ``[E, S]``, rows of every block, in the order in which their results lie.
        returns_ES: int64 ``[E, S]``, the first row of every block at its source.
        bases_S: int64 ``[W]``, the address of row 0 there.
        row_bytes: bytes of a row.
    """
    num_experts, num_ranks = received_ES.shape
    blocks = np.empty((3, num_experts * num_ranks), np.int64)
    row = 0
    for expert in range(num_experts):
        for source in range(num_ranks):
            block = expert * num_ranks + source
            blocks[1, block] = 0
            blocks[2, block] = bases_S[source] + (returns_ES[expert, source] - row) * row_bytes
            row += received_ES[expert, source]
            blocks[0, block] = row
    return blocks


@compiled
def regroup_blocks(received_ES: IntArray, arrived_ES: IntArray, base: int) -> IntArray:
    """Return int64 ``[3, B]``, likewise to copy what arrived.

    Args:
        received_ES: int64 ``[E, S]``, rows of every block, in the order that is wanted.
        arrived_ES: int64 ``[E, S]``, the first row of every block as they arrived; an expert's lie together.
        base: the address of row 0 of the copy.
    """
    num_experts, _ = received_ES.shape
    blocks = np.empty((3, num_experts), np.int64)
    row = 0
    for expert in range(num_experts):
        blocks[1, expert] = arrived_ES[expert, 0] - row
        blocks[2, expert] = base
        row += received_ES[expert].sum()
        blocks[0, expert] = row
    return blocks


@compiled
def _by_arrival(tokens_WEW: IntArray, last_EW: BoolArray, held_DE: IntArray) -> IntArray:
    """Return int64 ``[D, E]``, experts in the order in which their rows arrive; ``held_DE`` of no size: ascending."""
    num_ranks, num_experts, _ = tokens_WEW.shape
    experts_DE, rows = np.empty((num_ranks, num_experts), np.int64), np.empty(num_experts, np.int64)
    for destination in range(num_ranks):
        first = 0
        for place in range(num_experts):
            expert = held_DE[destination, place] if held_DE.size else place
            if not last_EW[expert, destination]:
                experts_DE[destination, first] = expert
                first += 1
        end = first
        for expert in range(num_experts):
            if last_EW[expert, destination]:
                rows[expert] = tokens_WEW[:, expert, destination].sum()
                place = end
                while place > first and rows[experts_DE[destination, place - 1]] < rows[expert]:
                    experts_DE[destination, place] = experts_DE[destination, place - 1]
                    place -= 1
                experts_DE[destination, place] = expert
                end += 1
    return experts_DE


@compiled
def _lay_out(tokens_WEW: IntArray, experts_DE: IntArray, rank: int) -> tuple[IntArray, IntArray]:
    """Return int64 ``[5, E, W]`` and ``[2, W]``: the arrays of a layout."""
    num_ranks, num_experts, _ = tokens_WEW.shape
    blocks, totals = np.empty((5, num_experts, num_ranks), np.int64), np.empty((2, num_ranks), np.int64)
    sent, starts, received, arrived, returns = blocks[0], blocks[1], blocks[2], blocks[3], blocks[4]
    for destination in range(num_ranks):
        row = 0
        for expert in experts_DE[destination]:
            for source in range(num_ranks):
                length = tokens_WEW[source, expert, destination]
                if source == rank:
                    sent[expert, destination], starts[expert, destination] = length, row
                if destination == rank:
                    received[expert, source], arrived[expert, source] = length, row
                row += length
        totals[0, destination] = row
    for source in range(num_ranks):
        row = 0
        for destination in range(num_ranks):
            for expert in range(num_experts):
                if destination == rank:
                    returns[expert, source] = row
                row += tokens_WEW[source, expert, destination]
        totals[1, source] = row
    return blocks, totals
