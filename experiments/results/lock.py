"""A run is measured by one process at a time: a lock in its folder, which ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from experiments.console import say
from experiments.results.manifest import now
from experiments.results.run_folder import LOCK, RunError

_POLL_S = (0.1, 2.0)
#: What a file system answers that has no locks, as some network file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class RunBusyError(RunError):
    """Another process measures the run; the message says which."""


@contextmanager
def hold(folder: Path, title: str, *, wait: bool) -> Iterator[None]:
    """Hold a run's folder, which is created; nobody else begins the run meanwhile or removes its files.

    The lock is the kernel's (``flock``), so it is gone with the process, however that ends. On NFS it holds between
    hosts where the server has locks; where there are none, a line says so and nothing is held.

    Args:
        folder: of the run.
        title: how the run is called in messages.
        wait: wait for another process that holds it, after a line that says which.

    Raises:
        RunBusyError: another process holds it, and ``wait`` is false.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        file = _acquire(path, title, wait=wait)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        say(f"{title}: {folder} is on a file system without locks; do not start the same run twice")
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(file)


def _acquire(path: Path, title: str, *, wait: bool) -> int:
    said, pause_s = "", _POLL_S[0]
    while True:
        if (file := _try(path)) is not None:
            with suppress(OSError):  # a full disk: the lock holds without saying whose it is
                os.truncate(file, 0)
                os.write(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": now()}).encode())
            return file
        holder = _holder(path)
        if not wait:
            raise RunBusyError(f"{title} is being measured by {holder}; start it again when that has ended")
        if holder not in (said, _UNKNOWN):
            say(f"{title}: being measured by {holder}; waiting for it")
            said = holder
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.3, _POLL_S[1])


def _try(path: Path) -> int | None:
    """Return the locked file, None where another process has it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(file, path):
                return file
        except BlockingIOError:
            os.close(file)
            return None
        except OSError:
            os.close(file)
            raise
        os.close(file)  # whoever held it has removed it meanwhile


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


_UNKNOWN = "another process"


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return _UNKNOWN
