"""Puts over PyTorch's symmetric memory, with a stand-in for it between threads: no device is needed."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from harmoeny.runtime.exchange import symmetric
from harmoeny.runtime.exchange.choose import open_exchange
from harmoeny.runtime.exchange.put import PutCommunicator
from harmoeny.runtime.exchange.symmetric import SymmetricWindows
from harmoeny.runtime.exchange.windows import WindowsError
from tests.harmoeny.runtime.exchange.test_put import WORLD_SIZE, run_layers
from tests.harmoeny.runtime.thread_ranks import TIMEOUT_S, ThreadCommunicator, run_threads


class Pads:
    """The signal pads of one rendezvous: a signal waits until the one before it on its channel was taken."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(WORLD_SIZE, timeout=TIMEOUT_S)
        self.free: dict[tuple[int, int, int], threading.Semaphore] = defaultdict(lambda: threading.Semaphore(1))
        self.set: dict[tuple[int, int, int], threading.Semaphore] = defaultdict(lambda: threading.Semaphore(0))


class Handle:
    signal_pad_size = 4 * WORLD_SIZE * 3  # a channel for barriers and two for signals

    def __init__(self, rank: int, buffers: list[Tensor], pads: Pads) -> None:
        self.rank, self.buffers, self.pads = rank, buffers, pads

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.buffers[rank][: sizes[0]].view(dtype)

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        assert (channel, timeout_ms) == (0, TIMEOUT_S * 1000)
        self.pads.barrier.wait()

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        assert 1 <= channel <= 2
        assert self.pads.free[self.rank, dst_rank, channel].acquire(timeout=timeout_ms / 1000)
        self.pads.set[self.rank, dst_rank, channel].release()

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        assert self.pads.set[src_rank, self.rank, channel].acquire(timeout=timeout_ms / 1000)
        self.pads.free[src_rank, self.rank, channel].release()


class SymmetricMemory:
    """What of the module is used: freed memory is given out again, with its signal pad. ``threads`` tells who calls."""

    def __init__(self) -> None:
        self.threads = threading.local()
        self.full: set[int] = set()  # ranks without memory
        self.pads: dict[int, Pads] = defaultdict(Pads)
        self.lock = threading.Lock()

    def empty(self, num_bytes: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.threads.comm.rank in self.full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        segments: list[weakref.ref[Tensor]] = self.threads.segments
        free = next((i for i, tensor in enumerate(segments) if tensor() is None), len(segments))
        tensor = torch.empty(num_bytes, dtype=dtype, device=device)
        segments[free : free + 1] = [weakref.ref(tensor)]
        return tensor

    def rendezvous(self, tensor: Tensor, group: object) -> Handle:
        assert group == "everyone"
        comm: ThreadCommunicator = self.threads.comm
        segment = next(i for i, known in enumerate(self.threads.segments) if known() is tensor)
        buffers = comm.gather_objects(tensor.view(-1))  # another object: no handle keeps a tensor
        with self.lock:
            pads = self.pads[segment]
        return Handle(comm.rank, buffers, pads)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> SymmetricMemory:
    memory = SymmetricMemory()
    monkeypatch.setattr(torch.distributed, "_symmetric_memory", memory, raising=False)
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", memory)
    monkeypatch.setattr(symmetric, "_everyone", lambda: "everyone")
    return memory


def opened(threads: ThreadCommunicator, memory: SymmetricMemory) -> PutCommunicator:
    memory.threads.comm, memory.threads.segments = threads, []
    return PutCommunicator(threads, lambda: SymmetricWindows(threads), strict=True)


def test_rows_and_results_arrive(memory: SymmetricMemory) -> None:
    def rank_main(threads: ThreadCommunicator) -> None:
        comm = opened(threads, memory)
        run_layers(comm, 10)
        comm.close()

    run_threads(WORLD_SIZE, rank_main)


def test_signals_take_turns_with_the_channels(memory: SymmetricMemory) -> None:
    def rank_main(threads: ThreadCommunicator) -> None:
        comm = opened(threads, memory)
        left, right = (comm.rank - 1) % WORLD_SIZE, (comm.rank + 1) % WORLD_SIZE
        for layer in range(9):
            comm.gather_counts(torch.zeros(1, dtype=torch.int64))
            comm.reserve(2 * 4, 2)
            targets = [torch.zeros(1) for _ in range(2)]
            for part, target in enumerate(targets):
                source = torch.tensor([10.0 * layer + part])
                copies = comm.copy_between_peers([(source, right)], [(target, left)])
                if part or layer % 2:  # the first of every other layer is never waited for by who asked for it
                    copies.receiving[0][0].wait()
                    assert target.item() == 10 * layer + part

    run_threads(WORLD_SIZE, rank_main)


def test_signals_of_a_duplicate_are_its_own(memory: SymmetricMemory) -> None:
    def rank_main(threads: ThreadCommunicator) -> None:
        comm = opened(threads, memory)
        left, right = (comm.rank - 1) % WORLD_SIZE, (comm.rank + 1) % WORLD_SIZE
        both, targets = [comm, comm.duplicate()], [torch.zeros(1), torch.zeros(1)]
        copies = []
        for number, (one, target) in enumerate(zip(both, targets, strict=True)):
            one.reserve(4, 1)
            copies.append(one.copy_between_peers([(torch.tensor([1.0 + number]), right)], [(target, left)]))
        for sent in reversed(copies):
            sent.receiving[0][0].wait()
        assert [target.item() for target in targets] == [1, 2]

    run_threads(WORLD_SIZE, rank_main)


def test_a_rank_without_memory_keeps_nobody_waiting(memory: SymmetricMemory) -> None:
    memory.full = {1}

    def rank_main(threads: ThreadCommunicator) -> str:
        with pytest.raises(WindowsError) as refused:
            opened(threads, memory)
        return str(refused.value)

    for reason in run_threads(WORLD_SIZE, rank_main):
        assert reason.endswith("(CUDA out of memory)")


def test_what_has_no_room_is_named(memory: SymmetricMemory) -> None:
    def rank_main(threads: ThreadCommunicator) -> str:
        memory.threads.comm, memory.threads.segments = threads, []
        windows = SymmetricWindows(threads)
        threads.barrier()
        memory.full = {1}
        threads.barrier()
        with pytest.raises(WindowsError) as refused:
            windows.allocate(3 * 2**29)
        return str(refused.value)

    for reason in run_threads(WORLD_SIZE, rank_main):
        assert reason.startswith("1.5 GiB on the device of every rank, for what they exchange: no room (CUDA out of")


def test_pytorch_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", None)
    monkeypatch.setattr("harmoeny.runtime.exchange.choose.SharedWindows", SymmetricWindows)

    def rank_main(threads: ThreadCommunicator) -> tuple[str, str]:
        found = open_exchange(threads, "auto")
        return found.exchange, found.remark

    for used, remark in run_threads(WORLD_SIZE, rank_main):
        assert used == "collective"
        assert remark.startswith(f"PyTorch {torch.__version__} has no symmetric memory here (")
