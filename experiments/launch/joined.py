"""Be one rank of a job that torchrun or SLURM started."""

from __future__ import annotations

import atexit
import os
import signal
import socket

import torch.distributed as dist

from experiments.launch.environment import choose_gloo_interface, is_main_rank
from experiments.launch.join import join
from experiments.launch.local import RanksError
from experiments.launch.peers import Peers
from experiments.launch.rank import is_peer_lost, run_rank
from experiments.point.point import Point
from experiments.results.kept import is_kept
from experiments.results.run_folder import RunFolder
from experiments.text.prepare import prepare_point


def run_joined(point: Point) -> bool:
    """Run a point as this process's rank, together with all others.

    Returns:
        False where the point had been finished before.

    Raises:
        RanksError: another rank is gone or out of reach.
        ValueError: the text is not usable, or shorter than a sequence.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C has to end a rank that waits in a collective, too
    choose_gloo_interface()
    folder, peers = RunFolder(point.folder), Peers()
    try:
        return _run(point, folder, peers)
    except RuntimeError as error:
        if point.options.world_size == 1 or not is_peer_lost(error):
            raise
        reason = _reason(error, point, peers)
        if is_main_rank():
            folder.fail(reason)
        atexit.register(peers.end_stopped)  # once this rank has said so: what started it ends it as soon as one is dead
        raise RanksError(reason) from error


def _run(point: Point, folder: RunFolder, peers: Peers) -> bool:
    join(point.device_type, point.options.timeout_s)
    peers.meet()
    if _agree(is_kept(point), point):
        return False
    if is_main_rank():
        folder.begin(point)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        prepare_point(point)
    if point.options.world_size > 1:
        dist.barrier()
    run_rank(point, prepare_point(point), folder, on_timeout=peers.find_stopped)
    return True


def _agree(answer: bool, point: Point) -> bool:
    """Give all ranks rank 0's answer: a shared file system may show the others an older state."""
    if point.options.world_size == 1:
        return answer
    answers = [answer]
    dist.broadcast_object_list(answers, src=0)
    return answers[0]


def _reason(error: RuntimeError, point: Point, peers: Peers) -> str:
    first_line = str(error).strip().partition("\n")[0]
    found = f"{peers.stopped}, a stopped process" if peers.stopped else ""
    lost = found or "another rank, which failed or cannot be reached"
    return (
        f"rank {os.environ['RANK']} on {socket.gethostname()} (pid {os.getpid()}) lost {lost} "
        f"(timeout_s is {point.options.timeout_s}): {first_line}"
    )
