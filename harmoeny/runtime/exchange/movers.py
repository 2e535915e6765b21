"""How rows get into other ranks' memory and their results back: what the layout says, done by PyTorch or by Triton.

Shape letters: T tokens of this rank, K top_k, S rows sent, R rows received, H hidden size, E experts, W ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange import fused
from harmoeny.runtime.exchange.layout import Layout, regroup_blocks, return_blocks, send_blocks
from harmoeny.runtime.exchange.order import Assignments, Sent, exclusive_cumsum, ranges, send_order, tokens_of
from harmoeny.runtime.exchange.windows import view_of


@dataclass(frozen=True)
class WindowRows:
    """Rows in the memory of every rank, of which a view is made only where one is needed: it takes microseconds.

    Attributes:
        memory: uint8, by rank.
        addresses: where it begins.
        num_rows: int64 ``[W]``, rows that lie there.
        like: ``[any, H]``, of their width and type.
    """

    memory: Sequence[Tensor]
    addresses: Sequence[int]
    num_rows: IntArray
    like: Tensor

    def of(self, rank: int) -> Tensor:
        """Return ``[rows, H]``, those in a rank's memory."""
        return view_of(self.memory[rank], self.like.dtype, (int(self.num_rows[rank]), self.like.shape[1]))

    def __iter__(self) -> Iterator[Tensor]:
        """Return those of every rank."""
        return map(self.of, range(len(self.memory)))


@dataclass(frozen=True)
class Rows:
    """What is to be moved in one layer.

    Attributes:
        layout: from where to where.
        hidden_TH: ``[T, H]``, this rank's tokens.
        assignments: what they want executed.
        targets: where what ranks execute arrives.
        results: where the results of what they sent come back, by destination and expert.
    """

    layout: Layout
    hidden_TH: Tensor
    assignments: Assignments
    targets: WindowRows
    results: WindowRows


class Mover(ABC):
    """Moves the rows of one layer; what the device must know for all of it is brought there before anything moves.

    Attributes:
        sent: the rows that this rank sends; known once it has sent them.
    """

    sent: Sent

    @staticmethod
    def of(rows: Rows) -> Mover:
        """Return what moves rows fastest where they are."""
        return TritonMover(rows) if fused.is_available(rows.hidden_TH.device) else TorchMover(rows)

    @abstractmethod
    def send(self) -> None:
        """Write every token into the memory of the ranks that execute it."""

    @abstractmethod
    def arrived(self) -> Tensor:
        """Return ``[R, H]``, what arrived here, in the order in which this rank wants it; all have sent."""

    @abstractmethod
    def bring_back(self, results_RH: Tensor) -> None:
        """Write the results, in that order, into the memory of the ranks that sent the rows."""


class TorchMover(Mover):
    """Calls PyTorch for every destination, and on a CPU for every block, which is one pass over its rows."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        layout, device = rows.layout, rows.hidden_TH.device
        self.sent = Sent(send_order(rows.assignments, layout.sent_EW))
        arrived_ES, executed_ES = layout.arrived_ES, layout.received_ES
        self._regrouping_R: Tensor | None = None
        if layout.regroups:
            self._regrouping_R = ranges(layout.in_order(arrived_ES), layout.in_order(executed_ES), device)
            arrived_ES = np.zeros_like(arrived_ES)
            wanted = exclusive_cumsum(layout.in_order(executed_ES).reshape(-1))
            arrived_ES[layout.order] = wanted.reshape(-1, arrived_ES.shape[1])
        # What every source sent here, in the order in which it sent it.
        self._order_R = ranges(arrived_ES.T, executed_ES.T, device)

    def send(self) -> None:
        """Gather tokens."""
        token_S = tokens_of(self.sent.assignment_S, self._rows.assignments.expert_ids_TK.shape[1])
        if Device.of(token_S.device).has_own_memory:
            self._send_by_row(token_S)
        else:
            self._send_by_block(token_S)

    def _send_by_row(self, token_S: Tensor) -> None:
        """One kernel per destination that reads, and one that writes."""
        layout, hidden_TH = self._rows.layout, self._rows.hidden_TH
        starts_DE, lengths_DE = layout.starts_EW.T, layout.sent_EW.T
        position_S = ranges(starts_DE, lengths_DE, token_S.device)
        splits = lengths_DE.sum(axis=1).tolist()
        parts = zip(self._rows.targets, torch.split(token_S, splits), torch.split(position_S, splits), strict=True)
        for target, tokens, positions in parts:
            target.index_copy_(0, positions, hidden_TH.index_select(0, tokens))

    def _send_by_block(self, token_S: Tensor) -> None:
        """One pass over the rows, without memory in between: on a CPU an ``index_copy_`` takes ten times as long."""
        layout, hidden_TH, begin = self._rows.layout, self._rows.hidden_TH, 0
        starts_DE, lengths_DE = layout.starts_EW.T, layout.sent_EW.T
        for target, starts_E, lengths_E in zip(self._rows.targets, starts_DE, lengths_DE, strict=True):
            experts = np.flatnonzero(lengths_E)
            for start, length in zip(starts_E[experts].tolist(), lengths_E[experts].tolist(), strict=True):
                out = target.narrow(0, start, length)
                torch.index_select(hidden_TH, 0, token_S.narrow(0, begin, length), out=out)
                begin += length

    def arrived(self) -> Tensor:
        """Gather what arrived, where it is wanted in another order."""
        rows_RH = self._rows.targets.of(self._rows.layout.rank)
        return rows_RH if self._regrouping_R is None else rows_RH.index_select(0, self._regrouping_R)

    def bring_back(self, results_RH: Tensor) -> None:
        """Gather what every source sent."""
        layout = self._rows.layout
        order_S = torch.split(self._order_R, layout.received_ES.sum(axis=0).tolist())
        begins = layout.returns_ES[0].tolist()
        for result, begin, order in zip(self._rows.results, begins, order_S, strict=True):
            torch.index_select(results_RH, 0, order, out=result[begin : begin + len(order)])


class TritonMover(Mover):
    """One kernel for all destinations each way; all that they are told is one upload."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        layout, hidden_TH = rows.layout, rows.hidden_TH
        row_bytes = hidden_TH.shape[1] * hidden_TH.element_size()
        self._target_at, self._result_at = rows.targets.addresses, rows.results.addresses
        received_ES, returns_ES = layout.in_order(layout.received_ES), layout.in_order(layout.returns_ES)
        tables = [
            send_blocks(layout.sent_EW, layout.starts_EW, np.array(self._target_at), row_bytes),
            return_blocks(received_ES, returns_ES, np.array(self._result_at), row_bytes),
        ]
        self._regrouped_RH: Tensor | None = None
        if layout.regroups:
            self._regrouped_RH = hidden_TH.new_empty(layout.num_received, hidden_TH.shape[1])
            arrived_ES = layout.in_order(layout.arrived_ES)
            tables.append(regroup_blocks(received_ES, arrived_ES, self._regrouped_RH.data_ptr()))
        uploaded = Device.of(hidden_TH.device).upload(np.concatenate([table.reshape(-1) for table in tables]))
        parts = torch.split(uploaded, [table.size for table in tables])
        self._tables = [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]

    def send(self) -> None:
        """Read every token once, and write it to all of its experts."""
        rows = self._rows
        self.sent = fused.put_tokens(
            rows.hidden_TH, rows.assignments, self._tables[0], self._target_at, rows.layout.num_sent
        )

    def arrived(self) -> Tensor:
        """Copy what arrived, where it is wanted in another order."""
        arrived_RH, regrouped_RH = self._rows.targets.of(self._rows.layout.rank), self._regrouped_RH
        if regrouped_RH is None:
            return arrived_RH
        fused.put_rows(arrived_RH, self._tables[2], [regrouped_RH.data_ptr()], len(regrouped_RH))
        return regrouped_RH

    def bring_back(self, results_RH: Tensor) -> None:
        """Write every result to where its row came from."""
        fused.put_rows(results_RH, self._tables[1], self._result_at, self._rows.layout.num_received)


def write_to_all(source: Tensor, targets: Sequence[Tensor]) -> None:
    """Copy a tensor ``[n]`` to several, which may lie in other ranks' memory."""
    if fused.is_available(source.device):
        fused.put_copies(source, tuple(target.data_ptr() for target in targets))
        return
    for target in targets:
        target.copy_(source)
