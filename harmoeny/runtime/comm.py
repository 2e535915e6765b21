"""The three collectives that a MoE layer needs, over a process group or, for one rank, without any."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from harmoeny.placement import IntArray

#: PyTorch 2.13 renamed it and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Communicator:
    """Collectives over the default process group; one rank without a process group needs no communication.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
        device: where the tensors to exchange live.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
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
            _all_gather(gathered, counts)
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
        dist.all_to_all_single(received, rows, list(recv_splits), list(send_splits))
        return received

    def barrier(self) -> None:
        """Wait for all ranks and, on CUDA, for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world_size > 1:
            dist.barrier()
