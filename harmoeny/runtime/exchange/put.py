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

Shape letters: T tokens of this rank, K top_k, R rows received, H hidden size, E experts, W ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from harmoeny.choices import Exchange
from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device, Mark
from harmoeny.runtime.exchange.comm import Beside, Communicator, PeerCopies, SentRows
from harmoeny.runtime.exchange.layout import Layout
from harmoeny.runtime.exchange.movers import Mover, Rows, WindowRows, write_to_all
from harmoeny.runtime.exchange.order import Assignments, Expected
from harmoeny.runtime.exchange.windows import Windows, WindowsError, view_of

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
        self._tables: dict[tuple[int, torch.dtype], list[_Table]] = {}
        self._turn = 0
        self._mailbox_bytes = 0
        self._mailboxes = _Mailboxes(self.world_size)
        self._duplicates: list[Communicator] = []

    @property
    def overlaps(self) -> bool:
        """On CUDA, rows are put by kernels between those that compute; on a CPU, while a rank waits for others."""
        return self.exchange != Exchange.PUT or not Device.of(self.device).has_own_memory

    @property
    def backend(self) -> str:
        """The library that moves what is not put."""
        return self._inner.backend

    def gather_objects(self, own: T) -> list[T]:
        """Leave it to the inner communicator."""
        return self._inner.gather_objects(own)

    def gather_counts(self, counts: Tensor) -> IntArray:
        """Write the counts into a table of every rank; see :meth:`Communicator.gather_counts`."""
        table = self._write_counts(counts)
        self._windows.barrier()
        # Here the host waits for a CUDA device, once per layer: planning is its work. A copy on a CPU too, since the
        # table is written again.
        host: IntArray = np.array(table.counts.cpu().numpy())
        return host

    def begin_counts(self, counts: Tensor) -> Callable[[], IntArray]:
        """Write the counts; see :meth:`Communicator.begin_counts`."""
        device = Device.of(self.device)
        with device.beside():
            table = self._write_counts(counts)
            if device.has_own_memory:
                self._windows.barrier()  # the stream waits
                return device.download(table.counts)

        def wait() -> IntArray:
            self._windows.barrier()
            return device.download(table.counts)()

        return wait

    def _write_counts(self, counts: Tensor) -> _Table:
        """Write the counts into the table of every rank whose turn it is, and return it."""
        self._turn = 1 - self._turn
        table = self._tables_for(counts)[self._turn]
        write_to_all(counts, table.own_rows)
        return table

    def send_rows(
        self,
        hidden_TH: Tensor,
        assignments: Assignments,
        tokens_WEW: IntArray,
        order: Sequence[int] | None = None,
        expected: Expected | None = None,
    ) -> SentRows:
        """Write every row right into its receiver's memory; see :meth:`Communicator.send_rows`."""
        row_bytes = hidden_TH.shape[1] * hidden_TH.element_size()
        layout = Layout.of(tokens_WEW, self.rank, order, expected)
        for memory, num_rows in ((self._rows, layout.received_D), (self._results, layout.sent_S)):
            if not self._makes_room(memory, row_bytes * int(num_rows.max())):
                return self._inner.send_rows(hidden_TH, assignments, tokens_WEW, order)
        targets = WindowRows(self._rows.memory, self._rows.addresses, layout.received_D, hidden_TH)
        results = WindowRows(self._results.memory, self._results.addresses, layout.sent_S, hidden_TH)
        mover = Mover.of(Rows(layout, hidden_TH, assignments, targets, results))
        mover.send()
        self._windows.barrier()

        def bring_back(results_RH: Tensor) -> Tensor:
            mover.bring_back(results_RH)
            self._windows.barrier()
            return results.of(self.rank)

        return SentRows(mover.arrived(), mover.sent, bring_back)

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
        duplicate = PutCommunicator(inner, self._open_windows, strict=self._strict)
        self._duplicates.append(duplicate)
        return duplicate

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

    def _tables_for(self, counts: Tensor) -> list[_Table]:
        """Return the two tables for such counts; they are the same from layer to layer, until memory has to grow."""
        shape = (2, self.world_size, counts.numel())
        if self._counts.grow(math.prod(shape) * counts.element_size()):
            self._tables = {}
        key = (counts.numel(), counts.dtype)
        if key not in self._tables:
            pairs = [view_of(memory, counts.dtype, shape) for memory in self._counts.memory]
            self._tables[key] = [
                _Table([pair[turn, self.rank] for pair in pairs], pairs[self.rank][turn]) for turn in range(2)
            ]
        return self._tables[key]

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
        return view_of(self._mail.memory[owner][begin:], like.dtype, tuple(like.shape))

    def _put(self, targets: Sequence[tuple[Tensor, Tensor]], ranks: Sequence[int]) -> None:
        for source, target in targets:
            target.copy_(source, non_blocking=True)
        for rank in dict.fromkeys(ranks):
            self._windows.signal(rank)


class _Table(NamedTuple):
    """Counts of all ranks.

    Attributes:
        own_rows: by rank, ``[num_experts]`` in its memory, where this rank's counts go.
        counts: ``[world_size, num_experts]``, what this rank gets.
    """

    own_rows: list[Tensor]
    counts: Tensor


class _Memory:
    """Memory of one purpose in the windows, which grows with what is asked for.

    Attributes:
        memory: uint8, of every rank; empty before it is first asked for.
        addresses: where it begins, as this rank sees it.
    """

    def __init__(self, windows: Windows) -> None:
        self.memory: list[Tensor] = []
        self.addresses: list[int] = []
        self._windows = windows
        self._num_bytes = -1

    def grow(self, num_bytes: int) -> bool:
        """Have at least that much memory on every rank; all ranks call it together, with the same number.

        Returns:
            Whether it is other memory than before.

        Raises:
            WindowsError: on all ranks, one has no room.
        """
        if num_bytes <= self._num_bytes:
            return False
        self.memory, self._num_bytes = [], -1  # what is there is freed first
        # More than asked for, so that it is not done again for every batch that is a little larger.
        with torch.inference_mode(False):  # what is made in it cannot be written outside of it
            self.memory = self._windows.allocate(_aligned(max(1, num_bytes + num_bytes // 2)))
        self.addresses = [window.data_ptr() for window in self.memory]
        self._num_bytes = self.memory[0].nbytes
        return True


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


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
