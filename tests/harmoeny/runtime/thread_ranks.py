"""Ranks as threads of this process: the runtime's own code over collectives that copy between threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.runtime.exchange.comm import Communicator, PeerCopies
from harmoeny.runtime.exchange.windows import PeerLostError

T = TypeVar("T")
TIMEOUT_S = 30


class _Mailbox:
    """One tensor on its way to another thread."""

    def __init__(self) -> None:
        self.sent = threading.Event()
        self.tensor: Tensor | None = None


class World:
    """What the threads share."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=TIMEOUT_S)
        self.board: list[Any] = [None] * world_size
        self.boxes: dict[tuple[int, int, int], _Mailbox] = {}
        self.lock = threading.Lock()

    def exchange(self, rank: int, value: T) -> list[T]:
        self.board[rank] = value
        self.barrier.wait()
        everyone = list(self.board)
        self.barrier.wait()
        return everyone

    def box(self, src: int, dst: int, number: int) -> _Mailbox:
        with self.lock:
            return self.boxes.setdefault((src, dst, number), _Mailbox())


class _Receive:
    def __init__(self, box: _Mailbox, target: Tensor) -> None:
        self.box, self.target, self.waited = box, target, False

    def wait(self) -> None:
        assert not self.waited, "a receive can be waited for only once"
        self.waited = True
        assert self.box.sent.wait(TIMEOUT_S)
        assert self.box.tensor is not None
        self.target.copy_(self.box.tensor)


class ThreadCommunicator(Communicator):
    def __init__(self, world: World, rank: int) -> None:
        self.world, self.rank, self.world_size = world, rank, world.world_size
        self.device = torch.device("cpu")
        self.timeout_s = TIMEOUT_S
        self._numbers: dict[tuple[int, int], int] = {}
        self._duplicates: list[Communicator] = []

    def gather_objects(self, own: T) -> list[T]:
        return self.world.exchange(self.rank, own)

    def gather_counts(self, counts: Tensor) -> IntArray:
        return np.ascontiguousarray(np.stack([c.numpy() for c in self.world.exchange(self.rank, counts)]))

    def begin_counts(self, counts: Tensor) -> Callable[[], IntArray]:
        return lambda: self.gather_counts(counts)

    def exchange_rows(self, rows: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int]) -> Tensor:
        assert rows.shape[0] == sum(send_splits)
        parts = [p.clone() for p in torch.split(rows, list(send_splits))]
        received = [theirs[self.rank] for theirs in self.world.exchange(self.rank, parts)]
        assert [r.shape[0] for r in received] == list(recv_splits)
        return torch.cat(received)

    def barrier(self) -> None:
        self.world.barrier.wait()

    def duplicate(self) -> ThreadCommunicator:
        return self

    def copy_between_peers(
        self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]
    ) -> PeerCopies:
        for tensor, dst in sends:
            assert dst != self.rank, "process groups refuse it"
            box = self.world.box(self.rank, dst, self._next(self.rank, dst))
            box.tensor = tensor
            box.sent.set()
        boxes = [self.world.box(src, self.rank, self._next(src, self.rank)) for _, src in receives]
        return PeerCopies([[_Receive(b, t)] for b, (t, _) in zip(boxes, receives, strict=True)], [])

    def _next(self, src: int, dst: int) -> int:
        number = self._numbers.get((src, dst), 0)
        self._numbers[src, dst] = number + 1
        return number


def run_threads(world_size: int, function: Callable[[ThreadCommunicator], T]) -> list[T]:
    """Call ``function`` once per rank, all at once, and return the results by rank; the first error is raised."""
    world = World(world_size)

    def entry(rank: int) -> T:
        try:
            with torch.inference_mode():
                return function(ThreadCommunicator(world, rank))
        except BaseException:
            world.barrier.abort()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(entry, rank) for rank in range(world_size)]
        errors = [e for f in futures if (e := f.exception()) is not None]
        causes = [e for e in errors if not isinstance(e, (threading.BrokenBarrierError, PeerLostError))]
        if errors:
            raise (causes or errors)[0]
        return [f.result() for f in futures]
