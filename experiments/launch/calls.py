"""Call a function on new ranks of this machine and get its results back: for calibration and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import elastic_launch

from experiments.launch.host import host_config, stay_on_this_host
from experiments.launch.join import join

T = TypeVar("T")
_TIMEOUT_S = 120


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
    stay_on_this_host()
    device = join(device_type, _TIMEOUT_S)
    try:
        with torch.inference_mode():
            return function(device, *arguments)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
