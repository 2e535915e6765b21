"""Brings to rank 0 what all ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from harmoeny.runtime.exchange.comm import Communicator

T = TypeVar("T")


def on_rank_0(own: T, comm: Communicator) -> list[T]:
    """Return on rank 0 what all ranks have, by rank, and nothing on the others; all ranks call it together."""
    if comm.world_size == 1:
        return [own]
    gathered: list[Any] | None = [None] * comm.world_size if comm.rank == 0 else None
    dist.gather_object(own, gathered)
    return gathered or []


def all_on_rank_0(own: Sequence[T], comm: Communicator) -> list[T]:
    """Return on rank 0 the items of all ranks, rank after rank; as :func:`on_rank_0`."""
    return [item for items in on_rank_0(own, comm) for item in items]
