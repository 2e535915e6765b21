"""What this process finds around it: its place among ranks that SLURM started, its cores, the way to other hosts."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from typing import ClassVar

import psutil

from experiments.cores import usable_cores

#: Below the ports that systems hand out by themselves.
_PORTS = range(20000, 30000)
#: An address that is nobody's (RFC 5737).
_ANYWHERE = "192.0.2.1"


def adopt_slurm_step() -> None:
    """Set the variables that torchrun sets, where ``srun`` started several ranks; call it before anything reads them.

    A single task is no rank: it starts ranks of its own, as anywhere. Nothing changes under a torchrun that srun
    started, and ``MASTER_ADDR`` and ``MASTER_PORT`` are kept where they are set.
    """
    if not is_slurm_rank() or os.environ.get("RANK"):
        return
    given = os.environ
    port = _PORTS[(int(given["SLURM_JOB_ID"]) * 31 + int(given["SLURM_STEP_ID"])) % len(_PORTS)]
    own_tasks = list(_repeated(given["SLURM_STEP_TASKS_PER_NODE"]))[int(given["SLURM_NODEID"])]
    several_hosts = given["SLURM_STEP_NUM_NODES"] != "1"
    given.setdefault("MASTER_ADDR", first_host() if several_hosts else "127.0.0.1")
    given.setdefault("MASTER_PORT", str(port))
    given.update(
        RANK=given["SLURM_PROCID"],
        WORLD_SIZE=given["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=given["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(own_tasks),
    )


def is_slurm_rank() -> bool:
    """Tell whether ``srun`` started this process beside others; a batch script's own process does not count."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def num_threads(local_world_size: int) -> int:
    """Return how many cores a rank may use when its host's cores are shared out evenly.

    Args:
        local_world_size: number of ranks on this host.
    """
    cores = usable_cores().number
    one_per_task = os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ.get("WORLD_SIZE")
    if is_slurm_rank() and one_per_task and "SLURM_CPUS_PER_TASK" in os.environ:
        # SLURM may have bound the rank to cores of its own already, and then they must not be shared out once more.
        return min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, cores // local_world_size)


def first_host() -> str:
    """Return the first host of the step that ``srun`` started, from SLURM's list, such as ``gpu[07-09,12],login1``."""
    from submitit.slurm.slurm import SlurmJobEnvironment  # here, as only a step of several hosts needs it

    class Step(SlurmJobEnvironment):  # type: ignore[misc]  # it is not typed
        _env: ClassVar[dict[str, str]] = {"nodes": "SLURM_STEP_NODELIST"}

    return str(Step().hostnames[0])


def _repeated(counts: str) -> Iterator[int]:
    """Read SLURM's way to write a number per node, such as ``4(x2),3``."""
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        yield from [int(count)] * int(times or 1)


def choose_gloo_interface() -> None:
    """Let gloo use the interface that leads to rank 0, unless ``GLOO_SOCKET_IFNAME`` names another.

    By itself it takes the one that the host's own name resolves to, often loopback, where no other host finds it.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    interface = interface_towards(os.environ["MASTER_ADDR"])
    if interface == "lo" and os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        # Rank 0's host calls itself by a loopback address, as Debian's do: the default route leads to the others.
        interface = interface_towards(_ANYWHERE)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def interface_towards(host: str) -> str | None:
    """Return the interface by which packets to a host leave, or None where that is not known (IPv6, no such host)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing, but looks up the route
        except OSError:
            return None
        own_address = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == own_address for a in addresses):
            return name
    return None


def joined_world_size() -> int | None:
    """Return the number of ranks that torchrun or SLURM started, or None where this process stands alone."""
    if all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return int(os.environ["WORLD_SIZE"])
    return None


def is_main_rank() -> bool:
    """Tell whether this process speaks for the run: it stands alone or is rank 0."""
    return joined_world_size() is None or os.environ["RANK"] == "0"
