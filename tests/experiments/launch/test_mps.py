"""The MPS daemon that ranks on one GPU need, with a stand-in for it: it ends with the run, whatever ends that."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from experiments.launch.mps import CONTROL, MpsError, shared_gpus
from experiments.measure.measured import device_label
from harmoeny.runtime.device import CpuDevice
from tests.conftest import Load

#: `-d` starts a daemon that writes its pid where clients look for it; `quit` on standard input ends it.
STAND_IN = """#!/bin/sh
pid="$CUDA_MPS_PIPE_DIRECTORY/control.pid"
if [ "$1" = -d ]; then
    sleep 300 > /dev/null 2>&1 < /dev/null &
    echo $! > "$pid"
    echo $! > "$DAEMON_PID_FILE"
else
    read command
    [ "$command" = quit ] && kill "$(cat "$pid")"
fi
"""
BROKEN = """#!/bin/sh
[ "$1" = -d ] || exit 1
echo "Cannot find MPS control daemon process: permission denied" >&2
exit 7
"""
#: A launcher that says when its block has begun, and waits in it.
LAUNCHER = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
from experiments.launch.mps import shared_gpus
with shared_gpus(4, "mps"):
    print("ready", flush=True)
    import time
    time.sleep(100)
"""


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Install the stand-in; what is returned tells whether it runs."""
    install(STAND_IN, tmp_path, monkeypatch)
    pid_file = tmp_path / "pid"
    monkeypatch.setenv("DAEMON_PID_FILE", str(pid_file))

    def runs() -> bool:
        assert pid_file.exists(), "it was never started"
        pid = int(pid_file.read_text())
        return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE

    return runs


def install(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "bin" / CONTROL
    path.parent.mkdir()
    path.write_text(script)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)


def folders(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("harmoeny-mps-*"))


def await_end(daemon: Callable[[], bool], tmp_path: Path) -> None:
    deadline = time.monotonic() + 10
    while (daemon() or folders(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not daemon()
    assert not folders(tmp_path)


@pytest.mark.programs
def test_ranks_find_the_daemon_and_their_share_of_it(daemon: Callable[[], bool], tmp_path: Path) -> None:
    before = dict(os.environ)
    with shared_gpus(4, "mps"):
        assert daemon()
        (folder,) = folders(tmp_path)
        assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == os.environ["CUDA_MPS_LOG_DIRECTORY"] == str(folder)
        assert os.environ["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "25"
        assert os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] == "1"
    await_end(daemon, tmp_path)
    assert dict(os.environ) == before


@pytest.mark.programs
def test_it_ends_with_an_error(daemon: Callable[[], bool], tmp_path: Path) -> None:
    with pytest.raises(KeyError), shared_gpus(2, "mps"):
        raise KeyError
    await_end(daemon, tmp_path)


@pytest.mark.programs
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_its_launcher(number: signal.Signals, daemon: Callable[[], bool], tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "ready\n"
    assert daemon()
    os.killpg(launcher.pid, number)  # as Ctrl-C does, and at worst
    launcher.wait(timeout=30)
    await_end(daemon, tmp_path)


@pytest.mark.programs
def test_a_daemon_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(BROKEN, tmp_path, monkeypatch)
    reason = (
        "nvidia-cuda-mps-control -d ended with exit status 7: Cannot find MPS control daemon process: permission denied"
    )
    with pytest.raises(MpsError, match=f"^{reason}$"), shared_gpus(2, "mps"):
        pass
    assert not folders(tmp_path)


def test_without_a_daemon_ranks_take_turns_if_that_is_asked_for() -> None:
    with shared_gpus(2, "time_sliced"):
        assert os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] == "1"
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES" not in os.environ


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["ranks_per_gpu=0"], "ranks_per_gpu: 0, must be at least 1"),
        (["gpu_sharing=mig"], "gpu_sharing: 'mig', must be one of mps, time_sliced"),
        (["exchange=collective"], "exchange: 'collective', must be auto or put with ranks_per_gpu=4: NCCL refuses"),
        (["device=cpu"], "ranks_per_gpu: 4, must be 1 with device=cpu"),
        (["backend=simulator", "hardware=cpu_core"], "ranks_per_gpu: 4, must be 1 with backend=simulator"),
        ([], f"ranks_per_gpu: 4, must be 1 here: there is no {CONTROL}; .*gpu_sharing=time_sliced"),
        (["world_size=5"], "world_size: 5, must be at most 4, the CUDA devices here with ranks_per_gpu=4"),
        (["gpu_sharing=time_sliced"], ""),
    ],
)
def test_where_ranks_cannot_share_a_gpu_it_is_said_why(
    options: list[str], reason: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harmoeny.runtime.device.Device.of", lambda _: OneGpu())
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=reason) if reason else nullcontext():
        load("ranks_per_gpu=4", "world_size=4", "device=cuda", *options)


class OneGpu(CpuDevice):
    """As far as the checks of a host ask."""

    num_here: ClassVar[Any] = 1


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"ranks_per_gpu": 4}, "4 ranks on one H200, a quarter of its SMs each"),
        ({"ranks_per_gpu": 6}, "6 ranks on one H200, 1/6 of its SMs each"),
        ({"ranks_per_gpu": 2, "gpu_sharing": "time_sliced"}, "2 ranks on one H200, which take turns (time_sliced)"),
        ({}, "H200"),
    ],
)
def test_records_say_what_a_rank_had(options: dict[str, Any], label: str, load: Load) -> None:
    point = load()
    assert device_label(replace(point, options=replace(point.options, **options)), "H200") == label
