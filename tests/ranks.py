"""Real ranks for tests: processes with a gloo process group, which never outlive the test."""

from __future__ import annotations

import multiprocessing as mp
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments.launch.host import start_method

TIMEOUT_S = 90
#: What takes seconds to import, once for all ranks of a test process.
_PRELOAD = ["experiments.launch.preload", "hypothesis", "pytest"]


def run_ranks(world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Call ``function(rank, *arguments)`` on new processes and return the results by rank.

    Raises:
        AssertionError: a rank failed, with its traceback, or did not answer in time.
    """
    context: Any = mp.get_context(start_method("cuda" if torch.cuda.is_available() else "cpu", *_PRELOAD))
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    store = folder / "rendezvous"
    ranks = [
        context.Process(
            target=_entry,
            args=(dict(os.environ), rank, world_size, str(store), pipes[rank][1], function, arguments),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    results: dict[int, Any] = {}
    try:
        for process in ranks:
            process.start()
        for _, writer in pipes:
            writer.close()
        waiting: dict[Any, int] = {reader: i for i, (reader, _) in enumerate(pipes)}
        while waiting:
            ready: list[Any] = wait(list(waiting), timeout=TIMEOUT_S)
            assert ready, f"ranks {sorted(waiting.values())} did not answer within {TIMEOUT_S} s"
            for reader in ready:
                rank = waiting.pop(reader)
                try:
                    ok, value = reader.recv()
                except EOFError:
                    ok, value = False, "ended without an answer"
                assert ok, f"rank {rank}: {value}"
                results[rank] = value
    finally:
        for process in ranks:
            if process.pid is not None:
                process.join(timeout=10 if len(results) == world_size else 0)
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _entry(
    environment: dict[str, str],
    rank: int,
    world_size: int,
    store: str,
    answer: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # of the process that forks: what it was when the first ranks were started
    os.environ |= environment | {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(world_size)
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        with torch.inference_mode():
            answer.send((True, function(rank, *arguments)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  (the parent raises it)
        answer.send((False, traceback.format_exc()))
