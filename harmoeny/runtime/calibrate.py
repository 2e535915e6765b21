"""What an expert costs on this machine: time per token and time per fetch, measured on the real weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from harmoeny.policy import ExpertCost
from harmoeny.runtime.comm import Communicator
from harmoeny.runtime.experts import LayerExperts

_TOKENS = 512
_REPEATS = 7


def measure_expert_cost(experts: LayerExperts, comm: Communicator) -> ExpertCost:
    """Measure one layer's experts on all ranks at once, so that they share memory bandwidth as they do in a run.

    Returns:
        The mean over ranks of their medians, the same on every rank.
    """
    sample = next(iter(experts.weights.values()))
    hidden_size = experts.weights["up"].shape[2]
    rows = torch.randn(_TOKENS, hidden_size).to(device=comm.device, dtype=sample.dtype)
    out = torch.empty_like(rows)
    slot = {name: w[0].to(comm.device, copy=True) for name, w in experts.weights.items()}

    def fetch(i: int) -> None:
        # Another expert every time: the one just copied may still be in a cache.
        for name, source in experts.expert(i % experts.num_experts).items():
            slot[name].copy_(source)

    comm.barrier()
    costs = torch.tensor(
        [
            _median_s(lambda _: experts.function(slot, rows, out), comm.device) / _TOKENS,
            _median_s(fetch, comm.device),
        ],
        dtype=torch.float64,
        device=comm.device,
    )
    if comm.world_size > 1:
        dist.all_reduce(costs)
    token_s, fetch_s = (costs / comm.world_size).tolist()
    return ExpertCost(token_s=token_s, fetch_s=fetch_s)


def _median_s(action: Callable[[int], None], device: torch.device) -> float:
    samples = []
    for i in range(_REPEATS + 1):
        start = time.perf_counter()
        action(i)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append(time.perf_counter() - start)
    return median(samples[1:])  # the first one warms up
