"""A file system of a few pages for one process, which a command under test soon fills."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWNS = 0x00020000


def can_mount() -> bool:
    """Tell whether this user may mount file systems for a process of its own."""
    try:
        return subprocess.run(["unshare", "-m", "true"], capture_output=True, timeout=10, check=False).returncode == 0
    except OSError:
        return False


@contextmanager
def small_disk(mounted: Path, options: str, left: Path) -> Iterator[None]:
    """Mount a file system that only this process and its children see; copy what is on it at the end to ``left``.

    Raises:
        OSError: it cannot be mounted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mounted], check=True)
    try:
        yield
    finally:
        shutil.copytree(mounted, left)
