"""How a rank that torchrun or SLURM started ends when it failed."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave_failed(status: int) -> NoReturn:
    """End the process with a status, and leave what PyTorch holds as it is.

    Where the other ranks are gone, or about to go, taking a process group apart may abort the process: its launcher
    would report a crash in place of the status, and bury the one line that says what went wrong.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
