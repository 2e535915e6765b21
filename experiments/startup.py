"""Importing a hundred libraries quickly, and leaving quietly when the user presses Ctrl-C meanwhile."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import in this block what the process needs for its whole life.

    Imports make half a million objects and no garbage, so the collector pauses meanwhile and never looks at them
    again: that takes a second off the start and another off the end of the process. Ctrl-C ends the process without a
    traceback.
    """
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
