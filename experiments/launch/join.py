"""Sets a process up as one of the ranks, whatever started it: threads, device, process group."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from experiments.launch.environment import num_threads
from harmoeny.runtime.device import Device, choose_device


def join(
    device_type: str, timeout_s: int, store: Store | None = None, *, ranks_per_gpu: int = 1, host_threads: int = 0
) -> torch.device:
    """Join the ranks that torchrun's variables name, once per process, and return this rank's device.

    Args:
        device_type: ``cpu`` (gloo) or ``cuda`` (NCCL; one device per rank); the host's cores are shared out.
        timeout_s: how long a collective may take.
        store: where the ranks find each other; None: where torchrun's variables say.
        ranks_per_gpu: ranks that share a device; NCCL refuses several, so they talk gloo.
        host_threads: of a rank's cores, those that compute as its host beside its device.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(device_type, int(os.environ.get("LOCAL_RANK", rank)), ranks_per_gpu)
    cores = num_threads(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    torch.set_num_threads(max(1, cores - host_threads))
    if world_size > 1 and not dist.is_initialized():
        backend = Device.of(device).process_group if ranks_per_gpu == 1 else "gloo"
        dist.init_process_group(
            backend,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            store=store,
            # So that NCCL's communicator comes up now, and not in a first call that may be a timed one.
            device_id=device if "nccl" in backend else None,
        )
    return device
