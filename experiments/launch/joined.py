"""Be one rank of a job that torchrun or SLURM started."""

from __future__ import annotations

import atexit
import os
import signal
import socket
from collections.abc import Sequence
from contextlib import ExitStack

import torch.distributed as dist

from experiments.launch.environment import choose_gloo_interface, is_main_rank
from experiments.launch.join import join
from experiments.launch.local import RanksError
from experiments.launch.muster import muster
from experiments.launch.peers import Peers
from experiments.launch.rank import is_peer_lost, run_rank
from experiments.point.point import Point
from experiments.results.begun import BegunRun, begun
from experiments.results.lock import RunBusyError
from experiments.results.neighbours import registered
from experiments.results.run_folder import RunFolder
from experiments.text.prepare import prepare_point
from experiments.text.tokens import TokenFile


def run_joined(points: Sequence[Point]) -> list[Point]:
    """Measure what is missing of a group of points as this process's rank, together with all others.

    Returns:
        What was measured; the others had been finished before.

    Raises:
        RanksError: another rank failed, is gone or out of reach.
        RunBusyError: another process measures the same.
        ValueError: the text is not usable, or shorter than a sequence.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C has to end a rank that waits in a collective, too
    choose_gloo_interface()
    runs: list[BegunRun] = []
    point, peers = points[0], Peers()
    with ExitStack() as held:
        try:
            join(point.device_type, point.options.timeout_s, muster(point.options.timeout_s))
            peers.meet()
            runs = _begin(points, held)
            if runs:
                _measure(runs, peers)
        except RunBusyError:
            raise
        except Exception as error:
            lost = point.options.world_size > 1 and isinstance(error, RuntimeError) and is_peer_lost(error)
            reason = _reason(error, point, peers) if lost else str(error)
            for run in runs if is_main_rank() else ():
                run.folder.fail(reason)
            if not lost:
                raise
            # Once this rank has said so: what started it ends it as soon as one is dead.
            atexit.register(peers.end_stopped)
            raise RanksError(reason) from error
    return [run.point for run in runs]


def _begin(points: Sequence[Point], held: ExitStack) -> list[BegunRun]:
    """Begin the runs that are missing, which rank 0 holds until ``held`` is closed.

    Raises:
        RunBusyError: another process measures one of them; raised on rank 0, the others just end.
    """
    first, refusal = points[0], ""
    runs = [BegunRun(point, RunFolder(point.folder)) for point in points]
    if is_main_rank():
        try:
            runs = held.enter_context(begun(points, wait=False))
        except (RunBusyError, OSError) as error:
            refusal = str(error)
    elif _is_first_of_host():
        held.enter_context(registered(f"{first.options.experiment}/{first.run_id}"))
    missing, refusal = _answer_of_rank_0(([run.point.run_id for run in runs], refusal), first)
    if refusal and is_main_rank():
        raise RunBusyError(refusal)
    if refusal:
        raise SystemExit(1)
    return [run for run in runs if run.point.run_id in missing]


def _measure(runs: Sequence[BegunRun], peers: Peers) -> None:
    point = runs[0].point
    _prepare(point, here=_is_first_of_host())
    tokens = _prepare(point, here=True)
    assert tokens is not None
    run_rank(runs, tokens, on_timeout=peers.find_stopped)


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


def _answer_of_rank_0(answer: tuple[list[str], str], point: Point) -> tuple[list[str], str]:
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
