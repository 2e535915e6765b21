"""Be one rank of a job that torchrun or SLURM started."""

from __future__ import annotations

import atexit
import os
import signal
import socket
from contextlib import ExitStack

import torch.distributed as dist

from experiments.launch.environment import choose_gloo_interface, is_main_rank
from experiments.launch.join import join
from experiments.launch.local import RanksError
from experiments.launch.muster import muster
from experiments.launch.peers import Peers
from experiments.launch.rank import is_peer_lost, run_rank
from experiments.point.point import Point
from experiments.results.begun import begun
from experiments.results.kept import is_kept
from experiments.results.lock import RunBusyError
from experiments.results.neighbours import registered
from experiments.results.run_folder import RunFolder
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile


def run_joined(point: Point) -> bool:
    """Run a point as this process's rank, together with all others.

    Returns:
        False where the point had been finished before.

    Raises:
        RanksError: another rank failed, is gone or out of reach.
        RunBusyError: another process measures the same.
        ValueError: the text is not usable, or shorter than a sequence.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C has to end a rank that waits in a collective, too
    choose_gloo_interface()
    folder: RunFolder | None = None
    peers = Peers()
    with ExitStack() as held:
        try:
            join(point.device_type, point.options.timeout_s, muster(point.options.timeout_s))
            peers.meet()
            folder = _begin(point, held)
            if folder is not None:
                _measure(point, folder, peers)
        except RunBusyError:
            raise
        except Exception as error:
            lost = point.options.world_size > 1 and isinstance(error, RuntimeError) and is_peer_lost(error)
            reason = _reason(error, point, peers) if lost else str(error)
            if is_main_rank() and folder is not None:
                folder.fail(reason)
            if not lost:
                raise
            # Once this rank has said so: what started it ends it as soon as one is dead.
            atexit.register(peers.end_stopped)
            raise RanksError(reason) from error
    return folder is not None


def _begin(point: Point, held: ExitStack) -> RunFolder | None:
    """Begin the run, which rank 0 holds until ``held`` is closed.

    Returns:
        The run's folder; None where the point had been finished before.

    Raises:
        RunBusyError: another process measures the same; raised on rank 0, the others just end.
    """
    folder: RunFolder | None = RunFolder(point.folder)
    refusal = ""
    if is_main_rank():
        try:
            folder = None if is_kept(point) else held.enter_context(begun(point, wait=False))
        except (RunBusyError, OSError) as error:
            refusal = str(error)
    elif _is_first_of_host():
        held.enter_context(registered(f"{point.options.experiment}/{point.run_id}"))
    kept, refusal = _answer_of_rank_0((folder is None, refusal), point)
    if refusal and is_main_rank():
        raise RunBusyError(refusal)
    if refusal:
        raise SystemExit(1)
    return None if kept else folder


def _measure(point: Point, folder: RunFolder, peers: Peers) -> None:
    _prepare(point, here=_is_first_of_host())
    tokens = _prepare(point, here=True)
    assert tokens is not None
    run_rank(point, tokens, folder, on_timeout=peers.find_stopped)


def _prepare(point: Point, *, here: bool) -> TokenFile | None:
    """Prepare the text where ``here`` is set; all ranks call it together, and none goes on where one failed.

    Raises:
        RanksError: another rank failed; with its reason.
        Exception: whatever went wrong on this one.
    """
    tokens, own = None, None
    try:
        tokens = prepare_point(point) if here else None
    except Exception as error:  # noqa: BLE001  (the other ranks wait for an answer)
        own = error
    failure = "" if own is None else f"rank {os.environ['RANK']} on {socket.gethostname()}: {str(own) or repr(own)}"
    failures: list[str] = [failure] * point.options.world_size
    if point.options.world_size > 1:
        dist.all_gather_object(failures, failure)
    if own is not None:
        raise own
    if first := next(filter(None, failures), None):
        raise RanksError(first)
    return tokens


def _is_first_of_host() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _answer_of_rank_0(answer: tuple[bool, str], point: Point) -> tuple[bool, str]:
    """Give all ranks rank 0's answer: a shared file system may show the others an older state."""
    if point.options.world_size == 1:
        return answer
    answers = [answer]
    dist.broadcast_object_list(answers, src=0)
    return answers[0]


def _reason(error: Exception, point: Point, peers: Peers) -> str:
    first_line = str(error).strip().partition("\n")[0]
    found = f"{peers.stopped}, a stopped process" if peers.stopped else ""
    lost = found or "another rank, which failed or cannot be reached"
    return (
        f"rank {os.environ['RANK']} on {socket.gethostname()} (pid {os.getpid()}) lost {lost} "
        f"(timeout_s is {point.options.timeout_s}): {first_line}"
    )
