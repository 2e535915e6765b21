"""A real SLURM of one node in a temporary folder, beside any other that the machine may have."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.packages import install_packages

#: Asks the tests to install SLURM where it is missing: a change of the system, so nobody gets it unasked.
INSTALL = "HARMOENY_INSTALL_SLURM"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")
_START_S = 30
_CONFIG = """\
ClusterName=harmoeny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=10000
KillWait=5
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8
PartitionName=all Nodes=node1 Default=YES MaxTime=INFINITE
"""


def need_slurm() -> None:
    """Skip the test where SLURM is missing, and cannot or shall not be installed."""
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons are started by root only")
    missing = _missing()
    if missing and os.environ.get(INSTALL) == "1" and shutil.which("apt-get"):
        missing = install_packages("slurm-wlm", "munge") or _missing()
    if missing:
        pytest.skip(f"no SLURM here ({missing}); {INSTALL}=1 lets the tests install slurm-wlm and munge by apt-get")


@contextmanager
def slurm_node() -> Iterator[dict[str, str]]:
    """Start SLURM and stop it in the end, with all of its jobs.

    Yields:
        The environment variables that its commands need.
    """
    # Not pytest's folder, which is root's alone: munge refuses a socket that others cannot reach.
    with tempfile.TemporaryDirectory(prefix="harmoeny-slurm-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        variables = {"SLURM_CONF": str(_configure(folder))}
        for command in (
            ["munged", "--foreground", "--force", *_munge_options(folder)],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "node1"],
        ):
            stack.enter_context(_daemon(command, folder, variables))
            if command[0] == "munged":
                _wait_until((folder / "munge" / "socket").exists, folder)
        _wait_until(lambda: _ask(variables, "sinfo", "--noheader", "--format=%t") == "idle", folder)
        stack.callback(_wait_until, lambda: _ask(variables, "squeue", "--noheader") == "", folder)
        stack.callback(_ask, variables, "scancel", "--user=root")
        yield variables


def _missing() -> str:
    return ", ".join(program for program in _PROGRAMS if shutil.which(program) is None)


def _configure(folder: Path) -> Path:
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    path = folder / "slurm.conf"
    path.write_text(_CONFIG.format(folder=folder, host=socket.gethostname(), port=ports[0], node_port=ports[1]))
    return path


def _munge_options(folder: Path) -> list[str]:
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    return [f"--{option}={folder / 'munge' / name}" for option, name in files.items()]


@contextmanager
def _daemon(command: list[str], folder: Path, variables: dict[str, str]) -> Iterator[None]:
    with (folder / f"{command[0]}.log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=10)


def _ask(variables: dict[str, str], *command: str) -> str | None:
    """Return what a command prints, or None where it fails."""
    answer = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, timeout=30, check=False
    )
    return answer.stdout.strip() if answer.returncode == 0 else None


def _wait_until(condition: Callable[[], bool], folder: Path) -> None:
    end = time.monotonic() + _START_S
    while not condition():
        logs = "".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
        assert time.monotonic() < end, f"SLURM does not answer:\n{logs}"
        time.sleep(0.1)
