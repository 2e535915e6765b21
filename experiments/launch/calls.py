"""Call a function on new ranks of this machine and get its results back: for calibration and benchmarks."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import elastic_launch

from experiments.launch.host import host_config, stay_on_this_host
from harmoeny.runtime.device import Device, choose_device

T = TypeVar("T")


def call_on_ranks(world_size: int, device_type: str, function: Callable[..., T], *arguments: object) -> list[T]:
    """Start ranks through torchelastic, call ``function(device, *arguments)`` on each, and return the results by rank.

    Args:
        world_size: number of ranks.
        device_type: ``cpu`` (gloo; the cores are shared out) or ``cuda`` (NCCL; one device per rank).
        function: a function of a module; its results must pickle.
        arguments: passed on.

    Raises:
        torch.distributed.elastic.multiprocessing.errors.ChildFailedError: a rank failed; all others were stopped.
    """
    config = host_config(world_size, device_type, "calls", preload=function.__module__)
    results = elastic_launch(config, _entry)(device_type, function, arguments)
    return [results[rank] for rank in range(world_size)]


def _entry(device_type: str, function: Callable[..., T], arguments: tuple[object, ...]) -> T:
    local_rank, world_size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    device = choose_device(device_type, local_rank)
    if device.type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    if world_size > 1:
        stay_on_this_host()
        dist.init_process_group(Device.of(device).process_group, timeout=timedelta(seconds=120))
    try:
        with torch.inference_mode():
            return function(device, *arguments)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
