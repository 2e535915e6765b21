"""The three collectives that a MoE layer needs, over a process group or, for one rank, without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.runtime.device import Device

#: PyTorch 2.13 renamed it and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


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
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
        """Use a process group of all ranks.

        Args:
            device: where the tensors to exchange live.
            group: the process group; None: the default one, if there is one.
        """
        self.device = device
        self._group = group
        self._distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self._distributed else 0
        self.world_size = dist.get_world_size() if self._distributed else 1

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
        """Return a communicator of the same ranks whose traffic never queues behind this one's; all ranks call it."""
        return Communicator(self.device, dist.new_group() if self.world_size > 1 else None)

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
