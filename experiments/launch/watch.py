"""The launcher's watch over its ranks: it names one that stops answering, and ends what can no longer end by itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

#: Between two signs of life of a rank, and between two looks of the launcher.
_BEAT_S = 0.5
_LOOK_S = 0.2
#: Share of timeout_s that may pass between two looks and still count as time in which a rank was silent.
_MOST_AT_ONCE = 0.25
#: So long after its last sign of life a rank counts as silent.
_SILENT_S = 3 * _BEAT_S
#: So long after a rank waited in vain the others may still say the same; the rank itself reports it later than that.
_OTHERS_S = 0.8
_PID, _BEATS, _IN_VAIN = range(3)


class Pulse:
    """What ranks tell their launcher through shared memory: that they live, and that they waited for another in vain.

    It is passed to the ranks when they are started; nothing of it is left behind, however they and the launcher end.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._values: Any = RawArray("q", 3 * world_size)

    def start(self, rank: int) -> None:
        """Give signs of life from now on; a rank calls it."""
        self._values[3 * rank + _PID] = os.getpid()
        threading.Thread(target=self._beat, args=(rank,), daemon=True).start()

    def waited_in_vain(self, rank: int) -> None:
        """Say that ``rank`` waited for another until its time was up; a rank calls it, and waits a while then."""
        self._values[3 * rank + _IN_VAIN] = 1

    def pid(self, rank: int) -> int:
        """Return a rank's process id; 0 before it began."""
        return int(self._values[3 * rank + _PID])

    def beats(self, rank: int) -> int:
        """Return how many signs of life a rank has given."""
        return int(self._values[3 * rank + _BEATS])

    def in_vain(self, rank: int) -> bool:
        """Tell whether a rank waited in vain."""
        return bool(self._values[3 * rank + _IN_VAIN])

    def _beat(self, rank: int) -> None:
        while True:
            self._values[3 * rank + _BEATS] += 1
            time.sleep(_BEAT_S)


class Watch:
    """Looks after ranks in a thread, as a context manager.

    A rank without a sign of life for ``timeout_s``, or the one that others waited for in vain, is killed, and
    :attr:`verdict` names it. torchelastic alone would blame the rank that reports the wait.

    Attributes:
        verdict: which rank did not answer; None while all do.
    """

    def __init__(self, pulse: Pulse, timeout_s: float) -> None:
        self.verdict: str | None = None
        self._pulse = pulse
        self._timeout_s = timeout_s
        self._beats = [0] * pulse.world_size
        self._silent_s = [0.0] * pulse.world_size
        self._in_vain_s = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        before = time.monotonic()
        while not self._over.wait(_LOOK_S):
            now = time.monotonic()
            # Time in which this process was stopped, as by Ctrl-Z, or its clock jumped, is nobody's silence; a late
            # look is no such time.
            self._look(min(max(now - before, 0.0), _MOST_AT_ONCE * self._timeout_s))
            before = now

    def _look(self, elapsed_s: float) -> None:
        pulse, ranks = self._pulse, range(self._pulse.world_size)
        if not any(pulse.pid(rank) for rank in ranks):
            return  # importing everything may take long
        for rank in ranks:
            beats = pulse.beats(rank)
            answers = beats != self._beats[rank] or self._is_gone(rank)
            self._beats[rank] = beats
            self._silent_s[rank] = 0.0 if answers else self._silent_s[rank] + elapsed_s
        for pid in filter(None, map(pulse.pid, ranks)):
            if _cannot_end(pid):
                _kill(pid)
        if self.verdict is None:
            self._in_vain_s += elapsed_s if any(map(pulse.in_vain, ranks)) else 0.0
            self._judge()

    def _judge(self) -> None:
        ranks = range(self._pulse.world_size)
        lost = [rank for rank in ranks if self._silent_s[rank] > self._timeout_s]
        if not lost and self._in_vain_s > _OTHERS_S:
            waited_for = [rank for rank in ranks if not self._pulse.in_vain(rank) and not self._is_gone(rank)]
            lost = [rank for rank in waited_for if self._silent_s[rank] > _SILENT_S] or waited_for
        if not lost:
            return
        silent = all(self._silent_s[rank] > _SILENT_S for rank in lost)
        # Whoever looks for the cause wants to know of all, also where one was stopped a moment later.
        lost = [rank for rank in ranks if rank in lost or is_stopped(self._pulse.pid(rank))]
        self.verdict = " and ".join(self._describe(rank) for rank in lost) + (
            f" did not answer any more (timeout_s is {self._timeout_s:g})"
            if silent
            else f" kept the others waiting for more than timeout_s ({self._timeout_s:g})"
        )
        for rank in lost:
            _kill(self._pulse.pid(rank))
        _kill_stopped_descendants()

    def _describe(self, rank: int) -> str:
        pid = self._pulse.pid(rank)
        if not pid:
            return f"rank {rank}, which never began,"
        return f"rank {rank} (pid {pid}{', a stopped process' if is_stopped(pid) else ''})"

    def _is_gone(self, rank: int) -> bool:
        pid = self._pulse.pid(rank)
        return pid != 0 and _status(pid) in (None, psutil.STATUS_ZOMBIE)


def is_stopped(pid: int) -> bool:
    """Tell whether a process was stopped (SIGSTOP, Ctrl-Z, a debugger), so that nothing of it runs."""
    return _status(pid) in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def _status(pid: int) -> str | None:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return None  # it is gone


def _cannot_end(pid: int) -> bool:
    """Tell whether a process was told to end and cannot, because it is stopped."""
    if not is_stopped(pid):
        return False
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    pending = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd:", "ShdPnd:"))]
    return any(mask >> (number - 1) & 1 for mask in pending for number in (signal.SIGTERM, signal.SIGINT))


def _kill_stopped_descendants() -> None:
    """Kill ranks that were stopped before they gave their process id."""
    for process in psutil.Process().children(recursive=True):
        if is_stopped(process.pid):
            _kill(process.pid)


def _kill(pid: int) -> None:
    if not pid:
        return
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        return  # it has ended by itself
