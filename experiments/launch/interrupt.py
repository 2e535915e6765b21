"""Lets the first signal that ends a process end a block of code with an exception that cannot get lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from experiments.launch.local import InterruptedRun

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: How often an exception that got lost is raised again.
_AGAIN_S = 0.05


@contextmanager
def interruptible() -> Iterator[None]:
    """Let the first signal that ends a process end what is in this block with InterruptedRun, so that it is noted.

    Python ignores an exception that is raised while it destroys an object, or in a callback of the garbage collector or
    of C code, wherever the signal happens to find it; it is raised again until the block is left, also where what
    follows is another error: numba fails where an exception got lost in its compiler's callback.
    """
    before = {number: handler for number in _NUMBERS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    alarm_before = signal.getsignal(signal.SIGALRM)
    received: list[signal.Signals] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        for other in before:
            signal.signal(other, signal.SIG_IGN)

        def again(_: int, frame: FrameType | None) -> None:
            if not _is_under_way(sys.exception()) and not _is_destructor(frame):
                raise InterruptedRun(received[0])

        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
        again(number, frame)

    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    except Exception as error:
        if received:
            raise InterruptedRun(received[0]) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGALRM, alarm_before)


def _is_under_way(error: BaseException | None) -> bool:
    """Tell whether what is being handled is the interruption, or came while that was handled."""
    while error is not None and not isinstance(error, InterruptedRun):
        error = error.__context__
    return error is not None


def _is_destructor(frame: FrameType | None) -> bool:
    """Tell whether a frame is one of an object that is being destroyed, where Python prints exceptions and goes on."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None
