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
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from harmoeny.choices import Exchange
from harmoeny.placement import BoolArray, IntArray
from harmoeny.runtime.device import Device, Mark
from harmoeny.runtime.exchange.comm import Beside, Communicator, PeerCopies, SentRows
from harmoeny.runtime.exchange.layout import Layout
from harmoeny.runtime.exchange.movers import Mover, Rows, write_to_all
from harmoeny.runtime.exchange.order import Assignments
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
        num_experts = counts.numel()
        self._counts.grow(2 * self.world_size * num_experts * counts.element_size())
        tables = self._counts.memory
        self._table = 1 - self._table
        shape = (2, self.world_size, num_experts)
        write_to_all(counts, [_view(table, counts.dtype, shape)[self._table, self.rank] for table in tables])
        self._windows.barrier()
        own = _view(tables[self.rank], counts.dtype, shape)[self._table]
        # Here the host waits for a CUDA device, once per layer: planning is its work. A copy on a CPU too, since the
        # table is written again.
        host: IntArray = np.array(own.cpu().numpy())
        return host

    def send_rows(
        self,
        hidden_TH: Tensor,
        assignments: Assignments,
        tokens_WEW: IntArray,
        order: Sequence[int] | None = None,
        fetched_EW: BoolArray | None = None,
    ) -> SentRows:
        """Write every row right into its receiver's memory; see :meth:`Communicator.send_rows`."""
        hidden_size, dtype = hidden_TH.shape[1], hidden_TH.dtype
        layout = Layout.of(tokens_WEW, self.rank, order, fetched_EW)
        for memory, num_rows in ((self._rows, layout.received_D), (self._results, layout.sent_S)):
            if not self._makes_room(memory, hidden_size * dtype.itemsize * int(num_rows.max())):
                return self._inner.send_rows(hidden_TH, assignments, tokens_WEW, order)

        def views(memory: _Memory, num_rows: IntArray) -> list[Tensor]:
            sizes = zip(memory.memory, num_rows.tolist(), strict=True)
            return [_view(window, dtype, (rows, hidden_size)) for window, rows in sizes]

        targets, results = views(self._rows, layout.received_D), views(self._results, layout.sent_S)
        mover = Mover.of(Rows(layout, hidden_TH, assignments, targets, results))
        mover.send()
        self._windows.barrier()

        def bring_back(results_RH: Tensor) -> Tensor:
            mover.bring_back(results_RH)
            self._windows.barrier()
            return results[self.rank]

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
            with torch.inference_mode(False):  # what is made in it cannot be written outside of it
                self.memory = self._windows.allocate(_aligned(max(1, num_bytes + num_bytes // 2)))


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
