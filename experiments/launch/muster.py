"""Before ranks that torchrun or SLURM started meet: none waits for one that cannot come, as its host lacks something.

Everything up to here, such as reading the configuration and preparing the text, a rank does by itself.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from experiments.launch.environment import check_rank_variables, joined_world_size

#: How long a rank that failed stays for the others, which may still import everything.
_PATIENCE_S = 60.0
_HEARD_S = 10.0


class _State:
    """Of this process.

    Attributes:
        store: where the ranks met; None before.
        over: whether this rank has answered.
    """

    store: Store | None = None
    over = False


def muster(timeout_s: float) -> Store | None:
    """Wait until all ranks are here and can go on; once per process.

    Returns:
        Where they met; None for a single rank.

    Raises:
        ValueError: another rank cannot; its reason.
        torch.distributed.DistError: one did not come in ``timeout_s``.
    """
    world_size = joined_world_size() or 1
    if world_size > 1 and not _State.over:
        _State.store, reason = _answer("", world_size, timeout_s)
        if reason:
            raise ValueError(reason)
    return _State.store


def tell_others(reason: str) -> None:
    """Tell the other ranks, where they wait for this one, why it does not come."""
    with suppress(ValueError, RuntimeError, OSError):  # nobody to tell
        check_rank_variables()
        world_size = joined_world_size() or 1
        if world_size > 1 and not _State.over:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            _answer(f"rank {os.environ['RANK']} on {socket.gethostname()}: {reason}", world_size, _PATIENCE_S)


def _answer(own: str, world_size: int, timeout_s: float) -> tuple[Store, str]:
    """Give an answer, empty where all is well, and return the first that is not."""
    _State.over = True
    timeout = timedelta(seconds=timeout_s)
    met, rank, _ = next(iter(rendezvous("env://", timeout=timeout)))
    store = PrefixStore("muster", met)
    store.set(f"answer {rank}", own)
    answers = [f"answer {other}" for other in range(world_size)]
    store.wait(answers, timeout)
    reason = next((text for text in (store.get(key).decode() for key in answers) if text), "")
    if reason:
        store.set(f"heard {rank}", "")
        if rank == 0:  # it may hold what the others read
            with suppress(dist.DistError):
                store.wait([f"heard {other}" for other in range(world_size)], timedelta(seconds=_HEARD_S))
    return PrefixStore("ranks", met), reason
