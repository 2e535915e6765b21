"""One-sided exchange: a rank writes rows where their receiver wants them, which the shared plan tells everybody.

Ranks wait for each other three times a layer: behind the counts, behind the rows and behind their results. That is also
why no memory is overwritten while somebody still reads it:

- Counts alternate between two tables. Who writes a table again has passed the barrier of the other, and a rank comes to
  that only after it has read the first.
- The rows of a layer are written after the barrier of its counts, to which a rank comes only when it has executed the
  rows of the layer before.
- Results are written after the barrier behind the rows, to which a rank comes only when it has added up the results of
  the layer before.
- Whole tensors lie in memory that is used anew from :meth:`PutCommunicator.reserve` on, which follows the counts of a
  layer too, and when a rank comes to those, it has used what it received before.

Shape letters: T tokens of this rank, S rows sent, R rows received, H hidden size, E experts, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from harmoeny.choices import Exchange
from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device, Mark
from harmoeny.runtime.exchange.comm import Beside, BringBack, Communicator, PeerCopies
from harmoeny.runtime.exchange.order import exclusive_cumsum, is_ascending, ranges
from harmoeny.runtime.exchange.windows import Windows, WindowsError

T = TypeVar("T")
#: Every tensor in a window begins at a multiple of this, in bytes.
_ALIGNMENT = 256


class PutCommunicator(Communicator):
    """Exchanges by writing into other ranks' memory."""

    exchange = Exchange.PUT

    def __init__(self, inner: Communicator, open_windows: Callable[[], Windows], *, strict: bool = False) -> None:
        """Open windows between the ranks; all ranks do it together.

        Args:
            inner: a communicator of the same ranks, for what is not worth a window.
            open_windows: opens windows; called once more for every duplicate.
            strict: where memory ends, raise an error, in place of going on with collectives and saying so.

        Raises:
            WindowsError: ranks cannot reach each other's memory.
        """
        self.device, self.timeout_s = inner.device, inner.timeout_s
        self.rank, self.world_size = inner.rank, inner.world_size
        self._inner, self._open_windows, self._strict = inner, open_windows, strict
        self._windows = open_windows()
        self._counts, self._rows, self._results, self._mail = (_Memory(self._windows) for _ in range(4))
        self._table = 0
        self._mailbox_bytes = 0
        self._mailboxes = _Mailboxes(self.world_size)
        self._duplicates: list[PutCommunicator] = []

    @property
    def backend(self) -> str:
        """The library that moves what is not put."""
        return self._inner.backend

    def gather_objects(self, own: T) -> list[T]:
        """Leave it to the inner communicator."""
        return self._inner.gather_objects(own)

    def gather_counts(self, counts: Tensor) -> IntArray:
        """Write the counts into a table of every rank; see :meth:`Communicator.gather_counts`."""
        num_experts = counts.numel()
        self._counts.grow(2 * self.world_size * num_experts * counts.element_size())
        tables = self._counts.memory
        self._table = 1 - self._table
        for table in tables:
            _view(table, counts.dtype, (2, self.world_size, num_experts))[self._table, self.rank] = counts
        self._windows.barrier()
        own = _view(tables[self.rank], counts.dtype, (2, self.world_size, num_experts))[self._table]
        # Here the host waits for a CUDA device, once per layer: planning is its work. A copy on a CPU too, since the
        # table is written again.
        host: IntArray = np.array(own.cpu().numpy())
        return host

    def send_rows(
        self, hidden_TH: Tensor, token_S: Tensor, tokens_WEW: IntArray, order: Sequence[int] | None = None
    ) -> tuple[Tensor, BringBack]:
        """Gather every block of rows right into its receiver's memory; see :meth:`Communicator.send_rows`."""
        rank, (_, hidden_size), dtype = self.rank, hidden_TH.shape, hidden_TH.dtype
        lengths_DES = tokens_WEW.transpose(2, 1, 0)  # by destination, expert and source, as rows lie there
        starts_DES = exclusive_cumsum(lengths_DES.reshape(self.world_size, -1), axis=1).reshape(lengths_DES.shape)
        row_bytes = hidden_size * dtype.itemsize
        received_D, sent_S = lengths_DES.sum(axis=(1, 2)), lengths_DES.sum(axis=(0, 1))
        if not self._makes_room(self._rows, row_bytes * int(received_D.max())):
            return self._inner.send_rows(hidden_TH, token_S, tokens_WEW, order)
        if not self._makes_room(self._results, row_bytes * int(sent_S.max())):
            return self._inner.send_rows(hidden_TH, token_S, tokens_WEW, order)
        row_memory, result_memory = self._rows.memory, self._results.memory

        blocks = _Blocks(starts_DES[:, :, rank], lengths_DES[:, :, rank])
        targets = [_view(m, dtype, (int(n), hidden_size)) for m, n in zip(row_memory, received_D, strict=True)]
        blocks.write(hidden_TH, token_S, targets)
        arrived_ES, executed_ES = starts_DES[rank], lengths_DES[rank]
        regrouping_R = None
        if not is_ascending(order):
            # The order that this rank wants its experts in is nothing that the others know.
            regrouping_R = ranges(arrived_ES[order], executed_ES[order], self.device)
            arrived_ES = np.zeros_like(arrived_ES)
            arrived_ES[order] = exclusive_cumsum(executed_ES[order].reshape(-1)).reshape(-1, self.world_size)
        # What every source sent here, in the order in which it sent it, for the way back.
        order_R = ranges(arrived_ES.T, executed_ES.T, self.device)
        order_S = torch.split(order_R, executed_ES.sum(axis=0).tolist())
        self._windows.barrier()
        rows_RH = targets[rank]
        if regrouping_R is not None:
            rows_RH = rows_RH.index_select(0, regrouping_R)

        def bring_back(results_RH: Tensor) -> Tensor:
            begins_S = exclusive_cumsum(lengths_DES.sum(axis=1), axis=0)[rank]
            for memory, begin, order in zip(result_memory, begins_S.tolist(), order_S, strict=True):
                target = _view(memory, dtype, (begin + len(order), hidden_size))[begin:]
                torch.index_select(results_RH, 0, order, out=target)
            self._windows.barrier()
            return _view(result_memory[rank], dtype, (len(token_S), hidden_size))

        return rows_RH, bring_back

    def exchange_rows(self, rows: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int]) -> Tensor:
        """Leave it to the inner communicator."""
        return self._inner.exchange_rows(rows, send_splits, recv_splits)

    def barrier(self) -> None:
        """Wait for all ranks and for this rank's device."""
        Device.of(self.device).synchronize()
        self._windows.barrier()
        Device.of(self.device).synchronize()

    def duplicate(self) -> PutCommunicator:
        """Open windows of its own; it is closed with this one."""
        inner = self._inner.duplicate()
        self._duplicates.append(PutCommunicator(inner, self._open_windows, strict=self._strict))
        return self._duplicates[-1]

    def reserve(self, pair_bytes: int, pair_tensors: int) -> None:
        """Empty the mailboxes, of which every rank has one for every other, and make them large enough."""
        self._mailboxes.clear()
        needed = pair_bytes + _ALIGNMENT * pair_tensors
        if needed > self._mailbox_bytes and self._makes_room(self._mail, _aligned(needed) * self.world_size):
            self._mailbox_bytes = self._mail.memory[0].nbytes // self.world_size // _ALIGNMENT * _ALIGNMENT

    def exchange_tensors(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], beside: Beside
    ) -> tuple[list[Tensor], PeerCopies]:
        """Receive in the mailboxes; see :meth:`Communicator.exchange_tensors`."""
        if self.exchange != Exchange.PUT:
            return self._inner.exchange_tensors(sends, receives, beside)
        targets = [(source, self._put_into(source, rank)) for source, rank in sends]
        buffers = [self._received_in(like, rank) for like, rank in receives]
        arrivals = self._mailboxes.expect(self._windows, [rank for _, rank in receives])
        sending = [beside(lambda: self._put(targets, [rank for _, rank in sends]))] if sends else []
        return buffers, PeerCopies([[arrivals[rank]] for _, rank in receives], sending)

    def copy_between_peers(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> PeerCopies:
        """Write into mailboxes, and copy from them what is waited for."""
        if self.exchange != Exchange.PUT:
            return self._inner.copy_between_peers(sends, receives)
        targets = [(source, self._put_into(source, rank)) for source, rank in sends]
        self._put(targets, [rank for _, rank in sends])
        arrivals = self._mailboxes.expect(self._windows, [rank for _, rank in receives])
        copies = [_CopyOut(arrivals[rank], self._received_in(tensor, rank), tensor) for tensor, rank in receives]
        return PeerCopies([[copy] for copy in copies], [])

    def close(self) -> None:
        """Close the windows, those of duplicates too."""
        for duplicate in self._duplicates:
            duplicate.close()
        self._windows.close()
        self._inner.close()

    def _makes_room(self, memory: _Memory, num_bytes: int) -> bool:
        """Grow some memory, unless this ended before; on all ranks alike, so that all go on in the same way."""
        if self.exchange == Exchange.PUT:
            try:
                memory.grow(num_bytes)
            except WindowsError as error:
                if self._strict:
                    raise
                self.exchange, self.remark = Exchange.COLLECTIVE, str(error)
        return self.exchange == Exchange.PUT

    def _put_into(self, source: Tensor, rank: int) -> Tensor:
        return self._mailbox_part(rank, self.rank, self._mailboxes.written, rank, source)

    def _received_in(self, like: Tensor, rank: int) -> Tensor:
        return self._mailbox_part(self.rank, rank, self._mailboxes.received, rank, like)

    def _mailbox_part(self, owner: int, sender: int, used: list[int], partner: int, like: Tensor) -> Tensor:
        """Return the next part of the mailbox that ``owner`` has for ``sender``, shaped as ``like``."""
        begin = sender * self._mailbox_bytes + used[partner]
        used[partner] += _aligned(like.nbytes)
        assert used[partner] <= self._mailbox_bytes, "more than was reserved"
        return _view(self._mail.memory[owner][begin:], like.dtype, tuple(like.shape))

    def _put(self, targets: Sequence[tuple[Tensor, Tensor]], ranks: Sequence[int]) -> None:
        for source, target in targets:
            target.copy_(source, non_blocking=True)
        for rank in dict.fromkeys(ranks):
            self._windows.signal(rank)


class _Memory:
    """Memory of one purpose in the windows, which grows with what is asked for.

    Attributes:
        memory: uint8, of every rank; empty before it is first asked for.
    """

    def __init__(self, windows: Windows) -> None:
        self.memory: list[Tensor] = []
        self._windows = windows

    def grow(self, num_bytes: int) -> None:
        """Have at least that much memory on every rank; all ranks call it together, with the same number.

        Raises:
            WindowsError: on all ranks, one has no room.
        """
        if not self.memory or self.memory[0].nbytes < num_bytes:
            self.memory = []  # what is there is freed first
            # More than asked for, so that it is not done again for every batch that is a little larger.
            self.memory = self._windows.allocate(_aligned(max(1, num_bytes + num_bytes // 2)))


@dataclass(frozen=True)
class _Blocks:
    """Where this rank's rows go.

    Attributes:
        starts_DE: int64 ``[W, E]``, first row of the block at every destination.
        lengths_DE: int64 ``[W, E]``, its rows.
    """

    starts_DE: IntArray
    lengths_DE: IntArray

    def write(self, hidden_TH: Tensor, token_S: Tensor, targets: Sequence[Tensor]) -> None:
        """Gather tokens into the targets ``[R, H]``, one per destination; ``token_S`` is by destination and expert."""
        if Device.of(hidden_TH.device).has_own_memory:
            self._write_by_row(hidden_TH, token_S, targets)
        else:
            self._write_by_block(hidden_TH, token_S, targets)

    def _write_by_row(self, hidden_TH: Tensor, token_S: Tensor, targets: Sequence[Tensor]) -> None:
        """One kernel per destination that reads, and one that writes."""
        position_S = ranges(self.starts_DE, self.lengths_DE, hidden_TH.device)
        splits = self.lengths_DE.sum(axis=1).tolist()
        parts = zip(targets, torch.split(token_S, splits), torch.split(position_S, splits), strict=True)
        for target, tokens, positions in parts:
            target.index_copy_(0, positions, hidden_TH.index_select(0, tokens))

    def _write_by_block(self, hidden_TH: Tensor, token_S: Tensor, targets: Sequence[Tensor]) -> None:
        """One pass over the rows, without memory in between: on a CPU an ``index_copy_`` takes ten times as long."""
        begin = 0
        for target, starts_E, lengths_E in zip(targets, self.starts_DE, self.lengths_DE, strict=True):
            experts = np.flatnonzero(lengths_E)
            for start, length in zip(starts_E[experts].tolist(), lengths_E[experts].tolist(), strict=True):
                out = target.narrow(0, start, length)
                torch.index_select(hidden_TH, 0, token_S.narrow(0, begin, length), out=out)
                begin += length


@dataclass
class _Mailboxes:
    """How far the mailboxes between this rank and every other are filled, in bytes."""

    world_size: int
    written: list[int] = field(init=False)
    received: list[int] = field(init=False)
    _expected: list[_Arrival] = field(default_factory=list)
    _signals: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.written, self.received = [0] * self.world_size, [0] * self.world_size
        self._signals = [0] * self.world_size

    def clear(self) -> None:
        """Empty them; signals that nobody has waited for are waited for now, as each has to be."""
        for arrival in self._expected:
            arrival.wait()
        self._expected = []
        self.written, self.received = [0] * self.world_size, [0] * self.world_size

    def expect(self, windows: Windows, ranks: Sequence[int]) -> dict[int, _Arrival]:
        """Return, by rank, what waits for its next signal that was not expected yet: one for all that a call sends."""
        arrivals = {}
        for rank in dict.fromkeys(ranks):
            self._signals[rank] += 1
            arrivals[rank] = _Arrival(windows, rank, self._signals[rank])
        self._expected += arrivals.values()
        return arrivals


class _Arrival:
    """Everything that one call sends from one rank, to be waited for by whoever reads any of it."""

    def __init__(self, windows: Windows, rank: int, number: int) -> None:
        self._windows, self._rank, self._number = windows, rank, number
        self._arrived: Mark | None = None

    def wait(self) -> None:
        """Wait; on CUDA the current stream does."""
        if self._arrived is None:
            self._windows.await_signal(self._rank, self._number)
            self._arrived = self._windows.device.now()
        else:
            self._windows.device.follow(self._arrived)


@dataclass(frozen=True)
class _CopyOut:
    """A tensor in a mailbox that is wanted elsewhere."""

    arrival: _Arrival
    source: Tensor
    target: Tensor

    def wait(self) -> None:
        """Wait for it and copy it."""
        self.arrival.wait()
        self.target.copy_(self.source)


def _view(memory: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the beginning of some memory, uint8, as another tensor."""
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
