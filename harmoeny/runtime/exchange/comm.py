"""What ranks exchange in a MoE layer, over a process group's collectives or, for one rank, without any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from harmoeny.choices import Exchange
from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device
from harmoeny.runtime.exchange.gather import gather_rows
from harmoeny.runtime.exchange.order import Assignments, Expected, Sent, by_expert

T = TypeVar("T")
#: Brings the results of rows home, in the order in which the rows were sent.
BringBack = Callable[[Tensor], Tensor]
#: Queues work beside computation, and returns what is to be waited for.
Beside = Callable[[Callable[[], None]], Any]

#: PyTorch 2.13 renamed it and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class SentRows:
    """What came of the exchange of rows, on one rank; memory is valid until the next rows are sent.

    Attributes:
        rows_RH: ``[R, H]``, the rows for this rank by expert, as it wanted them, and source.
        sent: the rows that this rank sent.
        bring_back: makes ``[S, H]``, the results of the rows sent, of ``[R, H]``, those of :attr:`rows_RH`.
    """

    rows_RH: Tensor
    sent: Sent
    bring_back: BringBack


@dataclass(frozen=True)
class PeerCopies:
    """Tensors on their way between ranks.

    Attributes:
        receiving: per tensor to receive, what is to be waited for, at most once.
        sending: likewise for the tensors to send, all together.
    """

    receiving: list[list[Any]]
    sending: list[Any]


class Communicator:
    """Collectives over a process group; one rank without a process group needs no communication.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
        device: where the tensors to exchange live.
        timeout_s: how long a rank waits for another.
        exchange: how rows travel.
        remark: why that is not what was asked for; empty: it is.
    """

    exchange: Exchange = Exchange.COLLECTIVE
    remark: str = ""

    def __init__(
        self, device: torch.device, group: dist.ProcessGroup | None = None, *, timeout_s: float = 1800.0
    ) -> None:
        """Use a process group of all ranks.

        Args:
            device: where the tensors to exchange live.
            group: the process group; None: the default one, if there is one.
            timeout_s: how long a rank waits for another where no process group says it.
        """
        self.device = device
        self.timeout_s = timeout_s
        self._group = group
        self._duplicates: list[Communicator] = []
        initialized = dist.is_initialized()
        self.rank = dist.get_rank() if initialized else 0
        self.world_size = dist.get_world_size() if initialized else 1

    @property
    def overlaps(self) -> bool:
        """Whether rows travel while this rank computes: a process group has threads or streams of its own."""
        return True

    @property
    def backend(self) -> str:
        """The library that moves tensors of :attr:`device`, as the process group says; gloo where there is none."""
        if not dist.is_initialized():
            return "gloo"
        backends = dict(part.split(":") for part in dist.get_backend_config(self._group).split(","))
        return str(backends[self.device.type])

    def gather_objects(self, own: T) -> list[T]:
        """Return what every rank gives, by rank; it travels through host memory, whatever the device."""
        if self.world_size == 1:
            return [own]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, own, group=self._group)
        return everyone

    def gather_counts(self, counts: Tensor) -> IntArray:
        """Exchange the counts of all ranks.

        Args:
            counts: int64 ``[num_experts]`` on :attr:`device`, assignments of this rank's tokens.

        Returns:
            int64 ``[world_size, num_experts]`` on the host: planning is host work, so a CUDA device is waited for here.
        """
        gathered = counts
        if self.world_size > 1:
            gathered = torch.empty(self.world_size * counts.numel(), dtype=counts.dtype, device=counts.device)
            _all_gather(gathered, counts, group=self._group)
        host: IntArray = gathered.cpu().numpy().reshape(self.world_size, counts.numel())
        return np.ascontiguousarray(host)

    def begin_counts(self, counts: Tensor) -> Callable[[], IntArray]:
        """Start what :meth:`gather_counts` does, so that this rank may compute meanwhile.

        Args:
            counts: as there; not to be written before they are exchanged.

        Returns:
            What waits for the counts of all ranks, and returns them; until then nothing else may be exchanged. On CUDA
            it does not wait for what was queued in between.
        """
        device, gathered, works = Device.of(self.device), counts[None], []
        with device.beside():
            if self.world_size > 1:
                gathered = counts.new_empty(self.world_size, counts.numel())
                works = [_all_gather(gathered.view(-1), counts, group=self._group, async_op=True)]
            if device.has_own_memory:
                for work in works:
                    work.wait()  # the stream does
                return device.download(gathered)

        def wait() -> IntArray:
            for work in works:
                work.wait()
            return device.download(gathered)()

        return wait

    def send_rows(
        self,
        hidden_TH: Tensor,
        assignments: Assignments,
        tokens_WEW: IntArray,
        order: Sequence[int] | None = None,
        expected: Expected | None = None,
    ) -> SentRows:
        """Send tokens where the plan wants them; all ranks call it together.

        Args:
            hidden_TH: ``[T, H]``, this rank's tokens.
            assignments: what they want executed.
            tokens_WEW: int64 ``[W, E, W]``, how many rows of every source and expert go to every rank; which of them,
                :func:`~harmoeny.runtime.exchange.order.send_order` says.
            order: the experts with rows for this rank, in the order in which it wants their rows; None: ascending.
            expected: what other ranks can know of that; None: nothing.
        """
        del expected  # rows are grouped on arrival anyway
        send_splits = tokens_WEW[self.rank].sum(axis=0).tolist()
        received_WE = tokens_WEW[:, :, self.rank]
        recv_splits = received_WE.sum(axis=1).tolist()
        # Before the exchange is queued: what is uploaded afterwards would wait for it.
        grouping_R = by_expert(received_WE, self.device, order)
        rows_SH, sent = gather_rows(hidden_TH, assignments, tokens_WEW[self.rank])
        rows_RH = self.exchange_rows(rows_SH, send_splits, recv_splits)
        if grouping_R is not None:
            rows_RH = rows_RH.index_select(0, grouping_R)

        def bring_back(results_RH: Tensor) -> Tensor:
            rows = results_RH
            if grouping_R is not None:
                rows = torch.empty_like(results_RH).index_copy_(0, grouping_R, results_RH)
            return self.exchange_rows(rows, recv_splits, send_splits)

        return SentRows(rows_RH, sent, bring_back)

    def exchange_rows(self, rows: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int]) -> Tensor:
        """All-to-all of matrix rows.

        Args:
            rows: ``[sum(send_splits), hidden_size]``, ordered by destination rank.
            send_splits: ``[world_size]``, rows for every rank.
            recv_splits: ``[world_size]``, rows from every rank.

        Returns:
            ``[sum(recv_splits), hidden_size]``, ordered by source rank.
        """
        if self.world_size == 1:
            return rows
        received = torch.empty((sum(recv_splits), rows.shape[1]), dtype=rows.dtype, device=rows.device)
        dist.all_to_all_single(received, rows, list(recv_splits), list(send_splits), group=self._group)
        return received

    def barrier(self) -> None:
        """Wait for all ranks and for this rank's device."""
        Device.of(self.device).synchronize()
        if self.world_size > 1:
            dist.barrier(group=self._group)

    def duplicate(self) -> Communicator:
        """Return a communicator of the same ranks whose traffic never queues behind this one's; all ranks call it.

        It is closed with this one.
        """
        if self.world_size == 1:
            return Communicator(self.device, timeout_s=self.timeout_s)
        group = dist.new_group(timeout=timedelta(seconds=self.timeout_s))
        # NCCL wants all ranks in a group's first call, and a later one may be between two of them only.
        dist.barrier(group=group)
        self._duplicates.append(Communicator(self.device, group, timeout_s=self.timeout_s))
        return self._duplicates[-1]

    def reserve(self, pair_bytes: int, pair_tensors: int) -> None:
        """Make room for the tensors that ranks send each other in a layer; all ranks call it, with the same numbers.

        It comes after the layer's counts, and what was received before it is not valid any more.

        Args:
            pair_bytes: the most that any rank sends any other until the next call.
            pair_tensors: the most tensors, likewise.
        """

    def exchange_tensors(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], beside: Beside
    ) -> tuple[list[Tensor], PeerCopies]:
        """Start sending tensors and receiving others into memory of their own; see :meth:`copy_between_peers`.

        Args:
            sends: tensors with the ranks that they go to.
            receives: tensors of the same shapes as those to receive, with the ranks that they come from.
            beside: runs what sending costs this rank.

        Returns:
            What is received, valid once it was waited for and until :meth:`reserve`, and what is to be waited for.
        """
        del beside  # a process group has threads or streams of its own
        buffers = [torch.empty(like.shape, dtype=like.dtype, device=self.device) for like, _ in receives]
        own = [(tensor.to(self.device, non_blocking=True), rank) for tensor, rank in sends]
        into = [(buffer, rank) for buffer, (_, rank) in zip(buffers, receives, strict=True)]
        return buffers, self.copy_between_peers(own, into)

    def close(self) -> None:
        """Let go of what was made for the exchange; nobody exchanges anything afterwards."""
        while self._duplicates:
            duplicate = self._duplicates.pop()
            duplicate.close()
            if dist.is_initialized():
                dist.destroy_process_group(duplicate._group)

    def copy_between_peers(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> PeerCopies:
        """Start sending and receiving tensors.

        Args:
            sends: tensors on :attr:`device` with the ranks that they go to.
            receives: tensors to fill with the ranks that they come from; both ranks of a pair name the tensors between
                them in the same order.
        """
        operations = [dist.P2POp(dist.isend, tensor, rank, self._group) for tensor, rank in sends]
        operations += [dist.P2POp(dist.irecv, tensor, rank, self._group) for tensor, rank in receives]
        works = dist.batch_isend_irecv(operations) if operations else []
        if len(works) < len(operations):  # NCCL makes one work of them all
            return PeerCopies([[*works] for _ in receives], works)
        return PeerCopies([[work] for work in works[len(sends) :]], works[: len(sends)])
