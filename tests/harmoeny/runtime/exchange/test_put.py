"""Puts under random delays: nobody writes what somebody still reads; and what happens where they are not possible."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from harmoeny.placement import IntArray
from harmoeny.runtime.exchange import shared
from harmoeny.runtime.exchange.choose import open_exchange
from harmoeny.runtime.exchange.comm import Communicator, SentRows
from harmoeny.runtime.exchange.order import Assignments
from harmoeny.runtime.exchange.put import PutCommunicator
from harmoeny.runtime.exchange.shared import SharedWindows
from harmoeny.runtime.exchange.windows import PeerLostError, Windows, WindowsError
from tests.harmoeny.runtime.thread_ranks import ThreadCommunicator, run_threads

WORLD_SIZE, NUM_EXPERTS, HIDDEN_SIZE = 3, 4, 5


def random_plan(layer: int) -> IntArray:
    return np.random.default_rng(layer).integers(0, 4, (WORLD_SIZE, NUM_EXPERTS, WORLD_SIZE))


def run_layers(comm: Communicator, num_layers: int) -> None:
    """Send numbers that say where they come from; look at them as long as computing and adding up would take."""
    rng = random.Random(comm.rank)

    def pause() -> None:
        time.sleep(rng.choice([0, 0, 0.001, 0.003]))

    for layer in range(num_layers):
        counts = comm.gather_counts(torch.full((NUM_EXPERTS,), 100 * layer + comm.rank))
        pause()
        assert (counts == 100 * layer + np.arange(WORLD_SIZE)[:, None]).all()
        tokens = random_plan(layer)
        num_sent = int(tokens[comm.rank].sum())
        hidden = (1000.0 * layer + 100 * comm.rank + torch.arange(num_sent))[:, None].expand(-1, HIDDEN_SIZE)
        sent = send_all(comm, hidden.contiguous(), tokens)
        for _ in range(2):
            assert sent.rows_RH[:, 0].tolist() == expected_rows(layer, comm.rank, tokens), (
                f"layer {layer}: rows changed"
            )
            pause()
        results = sent.bring_back(-sent.rows_RH)
        for _ in range(2):
            assert torch.equal(results, -hidden), f"layer {layer}: results changed"
            pause()


def send_all(comm: Communicator, hidden: Tensor, tokens: IntArray) -> SentRows:
    """Send every token once, to the ranks in turn and to the experts in turn."""
    own = tokens[comm.rank]
    expert_ids = torch.from_numpy(np.repeat(np.tile(np.arange(NUM_EXPERTS), WORLD_SIZE), own.T.reshape(-1)))
    return comm.send_rows(hidden, Assignments(expert_ids[:, None], own.sum(axis=1)), tokens)


def expected_rows(layer: int, receiver: int, tokens: IntArray) -> list[float]:
    """What arrives, by expert and source: written out, one row at a time."""
    sent: dict[tuple[int, int, int], list[float]] = {}
    for src in range(WORLD_SIZE):
        number = 0
        for dst in range(WORLD_SIZE):
            for expert in range(NUM_EXPERTS):
                for _ in range(int(tokens[src, expert, dst])):
                    sent.setdefault((src, expert, dst), []).append(1000.0 * layer + 100 * src + number)
                    number += 1
    order = [(src, expert, receiver) for expert in range(NUM_EXPERTS) for src in range(WORLD_SIZE)]
    return [row for block in order for row in sent.get(block, [])]


def opened(threads: ThreadCommunicator, windows: Callable[[Communicator], Windows] = SharedWindows) -> PutCommunicator:
    return PutCommunicator(threads, lambda: windows(threads), strict=True)


def test_no_memory_is_overwritten_while_a_peer_reads_it() -> None:
    def rank_main(threads: ThreadCommunicator) -> None:
        comm = opened(threads)
        run_layers(comm, 40)
        comm.close()

    run_threads(WORLD_SIZE, rank_main)


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_every_barrier_is_needed(left_out: int) -> None:
    class Hasty(SharedWindows):
        calls = 0

        def barrier(self) -> None:
            self.calls += 1
            if self.calls % 3 != left_out:
                super().barrier()

    def rank_main(threads: ThreadCommunicator) -> None:
        comm = opened(threads, Hasty)
        try:
            run_layers(comm, 40)
        finally:
            comm.close()  # nobody waits for a rank that has found what it looks for

    with pytest.raises(AssertionError):
        run_threads(WORLD_SIZE, rank_main)


def test_tensors_arrive_whatever_the_order_in_which_they_are_waited_for() -> None:
    def rank_main(threads: ThreadCommunicator) -> None:
        comm = opened(threads)
        left, right = (comm.rank - 1) % WORLD_SIZE, (comm.rank + 1) % WORLD_SIZE
        for layer in range(20):
            comm.gather_counts(torch.zeros(1, dtype=torch.int64))
            comm.reserve(3 * 7 * 4, 3)
            first, second, third = (torch.zeros(7) for _ in range(3))
            one, two, three = (torch.full((7,), layer + part) for part in (0.25, 0.5, 0.75))
            copies = [
                comm.copy_between_peers([(one, right)], [(first, left)]),
                comm.copy_between_peers([(two, right), (three, right)], [(second, left), (third, left)]),
            ]
            if layer % 5 < 4:  # what nobody waits for must not be taken for what comes later
                for works in [works for found in reversed(copies) for works in found.receiving]:
                    works[0].wait()
                assert torch.equal(torch.stack([first, second, third]), torch.stack([one, two, three]))
        comm.close()

    run_threads(WORLD_SIZE, rank_main)


def test_no_file_has_a_name_even_while_the_ranks_map_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So nothing is left of it, whenever a rank is killed."""
    monkeypatch.setattr(shared, "FOLDER", tmp_path)
    seen, map_file = [], shared._map

    def look(file: Any, num_bytes: int) -> Any:
        mapped = map_file(file, num_bytes)
        seen.append(list(tmp_path.iterdir()))
        return mapped

    monkeypatch.setattr(shared, "_map", look)

    def rank_main(threads: ThreadCommunicator) -> None:
        comm = opened(threads)
        run_layers(comm, 1)
        comm.close()

    run_threads(WORLD_SIZE, rank_main)
    assert len(seen) > WORLD_SIZE
    assert not any(seen)


def test_the_same_name_for_another_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another container a process of that number is another one, whose file nobody may write into."""
    identities = iter([(1, 1), (1, 2), (1, 1), (1, 1)])
    monkeypatch.setattr(shared, "_identity", lambda _: next(identities))

    def rank_main(threads: ThreadCommunicator) -> tuple[str, str]:
        found = open_exchange(threads, "auto")
        return found.exchange, found.remark

    for used, remark in run_threads(WORLD_SIZE, rank_main):
        assert used == "collective"
        assert re.fullmatch(r"/proc/\d+/fd/\d+ is another file for one rank than for the other", remark)


def refuse_large_files(monkeypatch: pytest.MonkeyPatch) -> None:
    allocate = os.posix_fallocate

    def full(descriptor: int, offset: int, num_bytes: int) -> None:
        if num_bytes > 4096:
            raise OSError(28, "No space left on device")
        allocate(descriptor, offset, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", full)


@pytest.mark.parametrize("asked", ["auto", "put"])
def test_a_shared_folder_that_is_too_small(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_large_files(monkeypatch)
    tokens = np.full((WORLD_SIZE, NUM_EXPERTS, WORLD_SIZE), 50)
    num_sent = int(tokens[0].sum())

    def rank_main(threads: ThreadCommunicator) -> tuple[str, str]:
        comm = open_exchange(threads, asked)
        assert comm.exchange == "put"  # the small ones fit
        hidden = torch.full((num_sent, HIDDEN_SIZE), float(comm.rank))
        for _ in range(2):
            comm.gather_counts(torch.zeros(1, dtype=torch.int64))
            sent = send_all(comm, hidden, tokens)
            assert sent.rows_RH[:, 0].tolist() == NUM_EXPERTS * ([0.0] * 50 + [1.0] * 50 + [2.0] * 50)
            assert torch.equal(sent.bring_back(sent.rows_RH), hidden)
        return comm.exchange, comm.remark

    if asked == "put":
        with pytest.raises(WindowsError, match=r"MiB do not go into /dev/shm \(No space left on device\)"):
            run_threads(WORLD_SIZE, rank_main)
        return
    for used, remark in run_threads(WORLD_SIZE, rank_main):
        assert used == "collective"
        assert "do not go into /dev/shm" in remark


def test_ranks_of_several_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank_main(threads: ThreadCommunicator, asked: str) -> tuple[str, str]:
        found = open_exchange(threads, asked)
        return found.exchange, found.remark

    hosts = iter(["a", "b", "a"] * 2)
    monkeypatch.setattr(shared, "host_of", lambda: (next(hosts), ""))
    found = run_threads(WORLD_SIZE, lambda threads: rank_main(threads, "auto"))
    assert found == [("collective", "the ranks run on 2 hosts")] * WORLD_SIZE
    with pytest.raises(ValueError, match="exchange: 'put', must be auto or collective here: the ranks run on 2 hosts"):
        run_threads(WORLD_SIZE, lambda threads: rank_main(threads, "put"))


def test_a_rank_that_does_not_come_is_named() -> None:
    def rank_main(threads: ThreadCommunicator) -> str:
        threads.timeout_s = 0.5
        comm = opened(threads)
        comm.barrier()
        if comm.rank == 1:
            threads.barrier()
            return ""
        try:
            comm.barrier()
        except PeerLostError as error:
            return str(error)
        finally:
            threads.barrier()
        return "came"

    found = run_threads(2, rank_main)
    assert found[0] == "rank 1 kept this one waiting: timed out after 0.5 s"


def test_a_rank_that_is_gone_ends_the_others_at_once() -> None:
    def rank_main(threads: ThreadCommunicator) -> tuple[float, str]:
        comm = opened(threads)
        comm.barrier()
        if comm.rank == 2:
            comm.close()  # what the system does for a process that is killed
            return 0.0, ""
        begin = time.monotonic()
        try:
            comm.barrier()
        except PeerLostError as error:
            return time.monotonic() - begin, str(error)
        return 0.0, "came"

    for waited_s, message in run_threads(WORLD_SIZE, rank_main)[:2]:
        assert message == "rank 2 is gone"
        assert waited_s < 2
