"""How ranks of this machine are started through torchelastic, whatever they do."""

from __future__ import annotations

import multiprocessing
import os

import torch
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.launcher.api import LaunchConfig

from experiments.launch.temporary import provide_sockets_folder
from harmoeny.runtime.device import Device


def host_config(
    world_size: int, device_type: str, run_id: str, preload: str, logs_specs: LogsSpecs | None = None
) -> LaunchConfig:
    """Return torchelastic's settings for ranks that all run here and are not started again when one fails.

    Args:
        world_size: number of ranks.
        device_type: ``cpu`` or ``cuda``.
        run_id: name of the run.
        preload: module that imports what ranks need, once for all that are forked.
        logs_specs: where their output goes; None: where this process's goes.
    """
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=run_id,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method=start_method(device_type, preload),
        logs_specs=logs_specs,
    )


def stay_on_this_host() -> None:
    """Let gloo use the loopback interface; called by a rank, so that nothing else that its launcher starts does so.

    Ranks of one host need no other, and on a host whose own name does not resolve gloo would find none.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def start_method(device_type: str, *preload: str) -> str:
    """Return how multiprocessing starts ranks, once it knows what they need.

    Args:
        device_type: ``cpu`` or ``cuda``.
        preload: modules that import it, once for all that are forked.
    """
    if not Device.of(torch.device(device_type)).survives_fork:
        return "spawn"  # an import may have touched the device
    # Imports everything once for all ranks of all points; a spawned rank takes seconds of a core to do so again.
    provide_sockets_folder()
    multiprocessing.set_forkserver_preload(list(preload))
    return "forkserver"
