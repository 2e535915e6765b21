"""An MPS daemon of our own, which lets several ranks run on one GPU at the same time, each on its share of the SMs.

Nothing of the card is set: the daemon and what it knows live in a folder of ours and end with the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from experiments.point.options import GpuSharing

CONTROL = "nvidia-cuda-mps-control"
_START_S, _STOP_S = 30, 60
#: Waits until the pipe to it is closed, which the end of the launcher does too, whichever way that comes.
_GUARDIAN = f"""
trap '' INT TERM HUP QUIT
cat > /dev/null
echo quit | timeout {_STOP_S} {CONTROL} > /dev/null 2>&1
rm -rf "$CUDA_MPS_PIPE_DIRECTORY"
"""


class MpsError(Exception):
    """The daemon does not start; the message is one line."""


@contextmanager
def shared_gpus(ranks_per_gpu: int, sharing: str) -> Iterator[None]:
    """Let ranks that are started inside share GPUs; what was started for that ends with the block or this process.

    Args:
        ranks_per_gpu: ranks on each; 1: nothing is done.
        sharing: ``mps``, or ``time_sliced``: without a daemon, ranks take turns.

    Raises:
        MpsError: the daemon does not start.
    """
    if ranks_per_gpu == 1:
        yield
        return
    # Ranks on one device are what PyTorch refuses otherwise.
    variables = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    if sharing == GpuSharing.TIME_SLICED:
        with _environment(variables):
            yield
        return
    variables["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{100 / ranks_per_gpu:g}"
    with _daemon() as of_daemon, _environment(variables | of_daemon):
        yield


@contextmanager
def _daemon() -> Iterator[dict[str, str]]:
    """Run a daemon and yield the variables by which its clients find it."""
    folder = tempfile.mkdtemp(prefix="harmoeny-mps-")
    variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    environment = os.environ | variables
    guardian = subprocess.Popen(  # noqa: S603
        ["sh", "-c", _GUARDIAN],  # noqa: S607
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this process's group, and must not end it before its work is done
    )
    try:
        _start(environment)
        yield variables
    finally:
        assert guardian.stdin is not None
        guardian.stdin.close()
        guardian.wait()


def _start(environment: dict[str, str]) -> None:
    try:
        started = subprocess.run(  # noqa: S603
            [CONTROL, "-d"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_START_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MpsError(f"{CONTROL} -d does not start: {error}") from error
    if started.returncode:
        said = " ".join(started.stdout.split()) or "it says nothing"
        raise MpsError(f"{CONTROL} -d ended with exit status {started.returncode}: {said}")


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set variables, which processes that are started inside inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def find_daemon() -> bool:
    """Tell whether this host has the daemon."""
    return shutil.which(CONTROL) is not None
