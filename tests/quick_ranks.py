"""The fork server of a program under test, forked before the program's first line: ranks take no imports then.

multiprocessing would start a new interpreter for it, which imports PyTorch and Transformers for seconds of a core.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import socket
from collections.abc import Callable, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any, NoReturn

#: How the command line begins that multiprocessing makes for its fork server.
_COMMAND = "from multiprocessing.forkserver import main"
_MOST_FILES = 4096


def fork_rank_server(execute: Callable[[tuple[str, ...]], int]) -> None:
    """Fork a process off that becomes this program's fork server when it needs one, and ends with it otherwise.

    Args:
        execute: executes what stands on Python's command line and returns the exit status.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _become_server(theirs, execute)
    theirs.close()
    start_interpreter = util.spawnv_passfds

    def started(path: bytes, words: Sequence[Any], descriptors: Sequence[int]) -> int:
        if ours.fileno() == -1 or not words[-1].startswith(_COMMAND):
            return start_interpreter(path, words, descriptors)
        start = words[-1], tuple(descriptors), dict(os.environ), str(Path.cwd())
        socket.send_fds(ours, [pickle.dumps(start)], list(descriptors))
        ours.close()
        return pid

    setattr(util, "spawnv_passfds", started)  # noqa: B010  (mypy lets no function be replaced)
    # For its log torchelastic asks for the source of all frames, of which there are pytest's, too: a second of a core.
    dynamic_rendezvous.get_method_name = lambda *_: ""


def _become_server(requests: socket.socket, execute: Callable[[tuple[str, ...]], int]) -> NoReturn:
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the program
        content, received, _, _ = socket.recv_fds(requests, 1 << 20, 4)
        if not content:
            os._exit(0)
        requests.close()  # else it closes what has its number by then
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command, numbers, environment, folder = pickle.loads(content)
        _renumber(received, numbers)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        code = execute(("-c", command))
    finally:
        os._exit(code)


def _renumber(received: Sequence[int], numbers: Sequence[int]) -> None:
    """Give descriptors the numbers that the command line says, and close all others but the standard streams."""
    beyond = max(numbers) + 1
    for descriptor, number in zip([fcntl.fcntl(d, fcntl.F_DUPFD, beyond) for d in received], numbers, strict=True):
        os.dup2(descriptor, number)
    begin = 3
    for number in sorted(numbers):
        os.closerange(begin, number)
        begin = number + 1
    os.closerange(begin, _MOST_FILES)
