"""What this process finds around it: its place among ranks that SLURM started, its cores, the way to other hosts."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from typing import ClassVar

import psutil

from harmoeny.cores import usable_cores

#: Below the ports that systems hand out by themselves.
_PORTS = range(20000, 30000)
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
#: An address that is nobody's (RFC 5737).
_ANYWHERE = "192.0.2.1"


def adopt_slurm_step() -> None:
    """Set the variables that torchrun sets, where ``srun`` started several ranks; call it before anything reads them.

    A single task is no rank: it starts ranks of its own, as anywhere. Nothing changes under a torchrun that srun
    started, and ``MASTER_ADDR`` and ``MASTER_PORT`` are kept where they are set.

    Raises:
        ValueError: a variable of the step is missing or wrong.
    """
    if not is_slurm_rank() or os.environ.get("RANK"):
        return
    given = os.environ
    job, step, node = (_step_number(name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID"))
    num_nodes = _step_number("SLURM_STEP_NUM_NODES")
    own_tasks = list(_repeated(_step_variable("SLURM_STEP_TASKS_PER_NODE")))
    if node >= len(own_tasks):
        raise ValueError(
            f"SLURM_NODEID: {node}, must be below {len(own_tasks)}, the nodes in SLURM_STEP_TASKS_PER_NODE="
            f"{given['SLURM_STEP_TASKS_PER_NODE']}"
        )
    if not given.get("MASTER_ADDR"):
        given["MASTER_ADDR"] = first_host() if num_nodes > 1 else "127.0.0.1"
    if not given.get("MASTER_PORT"):
        given["MASTER_PORT"] = str(_PORTS[(job * 31 + step) % len(_PORTS)])
    given.update(
        RANK=str(_step_number("SLURM_PROCID")),
        WORLD_SIZE=str(_step_number("SLURM_STEP_NUM_TASKS")),
        LOCAL_RANK=str(_step_number("SLURM_LOCALID")),
        LOCAL_WORLD_SIZE=str(own_tasks[node]),
    )


def check_rank_variables() -> None:
    """Refuse variables of torchrun or SLURM that name no place among ranks; empty ones count as not set.

    Raises:
        ValueError: the first that is wrong, its value and what is allowed.
    """
    given = os.environ
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if given.get(name) == "":
            del given[name]
    for name in ("SLURM_CPUS_PER_TASK", "WORLD_SIZE"):
        if given.get(name):
            _number(name, 1)
    if "RANK" not in given or "WORLD_SIZE" not in given:
        return  # one alone says nothing
    for name, what in (("MASTER_ADDR", "the host of rank 0"), ("MASTER_PORT", "a free port there")):
        if name not in given:
            raise ValueError(f"{name}: not set, must be {what} where RANK and WORLD_SIZE are set (torchrun sets all)")
    world_size = _number("WORLD_SIZE", 1)
    _number("RANK", 0, world_size - 1, "WORLD_SIZE - 1")
    _number("MASTER_PORT", 1, 65535)
    local = _number("LOCAL_WORLD_SIZE", 1, world_size, "WORLD_SIZE") if "LOCAL_WORLD_SIZE" in given else world_size
    if "LOCAL_RANK" in given:
        _number("LOCAL_RANK", 0, local - 1, "LOCAL_WORLD_SIZE - 1")
    try:
        socket.getaddrinfo(given["MASTER_ADDR"], None)
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"MASTER_ADDR: {given['MASTER_ADDR']!r}, must be a host that this one can find ({error})"
        ) from error


def check_library_variables() -> None:
    """Refuse variables that libraries read when they are imported, and then print about, fail at or pass over silently.

    Empty ones count as not set, but for ``CUDA_VISIBLE_DEVICES``: no device is visible then.

    Raises:
        ValueError: the first that is wrong, its value and what is allowed.
    """
    given = os.environ
    for name in (*_THREAD_VARIABLES, "COLUMNS"):
        if given.get(name) == "":
            del given[name]
    for name in _THREAD_VARIABLES:
        if name in given and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given[name]):
            raise ValueError(f"{name}: {given[name]!r}, must be a number of threads, at least 1")
    if "COLUMNS" in given:
        _number("COLUMNS", 1)
    devices = given.get("CUDA_VISIBLE_DEVICES", "")
    known = r"-?\d+|(GPU|MIG)-[\w/-]+|NoDevFiles"  # the last is SLURM's word for none
    if not all(re.fullmatch(known, device.strip()) for device in devices.split(",") if devices):
        raise ValueError(f"CUDA_VISIBLE_DEVICES: {devices!r}, must be devices' numbers or UUIDs, separated by commas")
    given["MPLBACKEND"] = "agg"  # figures are written to files, whatever shows those of the user's own programs


def check_gloo_interface() -> None:
    """Refuse an interface that this host does not have.

    Raises:
        ValueError: ``GLOO_SOCKET_IFNAME``.
    """
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    known = sorted(psutil.net_if_addrs())
    for name in chosen.split(",") if chosen else ():
        if name not in known:
            raise ValueError(f"GLOO_SOCKET_IFNAME: {name!r}, must be one of {', '.join(known)}")


def _number(name: str, low: int, high: int | None = None, high_is: str = "") -> int:
    """Read a variable that holds a number."""
    text = os.environ[name]
    limits = f"at least {low}" if high is None else f"{low} to {high}{f' ({high_is})' if high_is else ''}"
    if not text.isascii() or not text.isdigit() or int(text) < low or (high is not None and int(text) > high):
        raise ValueError(f"{name}: {text!r}, must be a number, {limits}")
    return int(text)


def _step_variable(name: str) -> str:
    """Read a variable of the step that ``srun`` started."""
    if not os.environ.get(name):
        raise ValueError(
            f"{name}: not set, must be as srun sets it for each of SLURM_STEP_NUM_TASKS="
            f"{os.environ.get('SLURM_STEP_NUM_TASKS')} tasks; without srun, unset SLURM_STEP_NUM_TASKS"
        )
    return os.environ[name]


def _step_number(name: str) -> int:
    _step_variable(name)
    return _number(name, 0)


def is_slurm_rank() -> bool:
    """Tell whether ``srun`` started this process beside others; a batch script's own process does not count.

    Raises:
        ValueError: ``SLURM_STEP_NUM_TASKS`` is no number.
    """
    return bool(os.environ.get("SLURM_STEP_NUM_TASKS")) and _number("SLURM_STEP_NUM_TASKS", 1) > 1


def num_threads(local_world_size: int) -> int:
    """Return how many cores a rank may use when its host's cores are shared out evenly.

    Args:
        local_world_size: number of ranks on this host.
    """
    cores = usable_cores().number
    one_per_task = os.environ.get("SLURM_STEP_NUM_TASKS") == os.environ.get("WORLD_SIZE")
    if is_slurm_rank() and one_per_task and os.environ.get("SLURM_CPUS_PER_TASK"):
        # SLURM may have bound the rank to cores of its own already, and then they must not be shared out once more.
        return min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, cores // local_world_size)


def first_host() -> str:
    """Return the first host of the step that ``srun`` started, from SLURM's list, such as ``gpu[07-09,12],login1``."""
    # Here, as only a step of several hosts needs it.
    from submitit.slurm.slurm import SlurmJobEnvironment, SlurmParseException

    nodes = _step_variable("SLURM_STEP_NODELIST")

    class Step(SlurmJobEnvironment):  # type: ignore[misc]  # it is not typed
        _env: ClassVar[dict[str, str]] = {"nodes": "SLURM_STEP_NODELIST"}

    refused = f"SLURM_STEP_NODELIST: {nodes!r}, must be a list of nodes as srun sets it"
    try:
        host = str(Step().hostnames[0])
    except (ValueError, IndexError, SlurmParseException) as error:
        raise ValueError(refused) from error
    if not re.fullmatch(r"\w[\w.-]*", host):
        raise ValueError(refused)
    return host


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
