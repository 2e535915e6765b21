"""The other ranks of a job that torchrun or SLURM started, as far as they run on this rank's host."""

from __future__ import annotations

import os
import signal
import socket

import psutil
import torch.distributed as dist

from experiments.launch.watch import is_stopped


class Peers:
    """The processes of the other ranks of this host."""

    def __init__(self) -> None:
        self._stopped: dict[int, psutil.Process] = {}
        self._processes: dict[int, psutil.Process] = {}

    def meet(self) -> None:
        """Learn which ranks are here; all ranks call it together, once their process group is there."""
        if not dist.is_initialized() or self._processes:
            return
        own = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
        everyone: list[tuple[str, int, float]] = [own] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        for rank, (host, pid, created) in enumerate(everyone):
            if host == own[0] and pid != own[1] and psutil.pid_exists(pid):
                process = psutil.Process(pid)
                if process.create_time() == created:  # else one of another container, which has pids of its own
                    self._processes[rank] = process

    def find_stopped(self) -> None:
        """Look which ranks here were stopped, so that nothing of them runs."""
        self._stopped = {rank: p for rank, p in self._processes.items() if p.is_running() and is_stopped(p.pid)}

    @property
    def stopped(self) -> str:
        """The ranks that were found stopped, in words; empty where there were none."""
        return " and ".join(f"rank {rank} (pid {process.pid})" for rank, process in self._stopped.items())

    def end_stopped(self) -> None:
        """Kill them: what started them would wait long for them to end by themselves."""
        for process in self._stopped.values():
            if process.is_running():
                process.send_signal(signal.SIGKILL)
