"""Eight ranks that load one model, and the most memory that they took together: run as a program, for a clean start.

The ranks are forked from a process that has imported everything, so that only the model is new memory in them.
"""

from __future__ import annotations

import gc
import json
import multiprocessing as mp
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from harmoeny.models.base import MoEModel
from harmoeny.models.transformers import Transformers
from harmoeny.runtime.exchange.comm import Communicator
from harmoeny.runtime.memory.sharing import share_model

WORLD_SIZE = 8


def rank_main(rank: int, folder: str, begin: Any, loaded: Any, measured: Any) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    hold(rank, f"{folder}/warm")  # whatever else a first load allocates
    gc.collect()
    gc.freeze()
    begin.wait()
    model = hold(rank, f"{folder}/model")
    loaded.wait()
    measured.wait()
    del model
    dist.destroy_process_group()


def hold(rank: int, folder: str) -> MoEModel:
    """Load a model as the harness does, and read every page of it."""
    comm = Communicator(torch.device("cpu"))
    model = Transformers(local_path=folder).build(0, "cpu" if rank == 0 else "meta")
    share_model(model, comm, rank)
    tensors = [*model.module.parameters(), *(w for layer in model.experts for w in layer.weights.values())]
    assert all(torch.isfinite(tensor.sum()) for tensor in tensors)
    return model


def memory_bytes(pids: list[int]) -> int:
    """Return the ranks' memory, every shared page counted once; file pages, which the system can drop, are left out.

    The ranks stand still meanwhile: a page that gets shared between two readings would be counted twice.
    """
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in pids]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    lines = [line for rollup in rollups for line in rollup.splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def main(folder: str) -> None:
    Transformers(local_path=f"{folder}/model").build(0, "meta")  # imports the model's code
    context = mp.get_context("fork")
    begin, loaded, measured = (context.Barrier(WORLD_SIZE + 1) for _ in range(3))
    ranks = [
        context.Process(target=rank_main, args=(rank, folder, begin, loaded, measured), daemon=True)
        for rank in range(WORLD_SIZE)
    ]
    for rank in ranks:
        rank.start()
    pids = [rank.pid for rank in ranks if rank.pid is not None]
    while begin.n_waiting < WORLD_SIZE:
        time.sleep(0.03)
    before = peak = memory_bytes(pids)
    begin.wait(timeout=60)
    while loaded.n_waiting < WORLD_SIZE:
        if not all(rank.is_alive() for rank in ranks):
            sys.exit("a rank ended early")
        peak = max(peak, memory_bytes(pids))
        time.sleep(0.03)
    after = memory_bytes(pids)
    loaded.wait(timeout=60)
    measured.wait(timeout=60)
    for rank in ranks:
        rank.join(timeout=30)
    print(json.dumps({"before": before, "peak": peak - before, "after": after - before}))


if __name__ == "__main__":
    main(sys.argv[1])
