"""Commands under test, each in a session of its own, and every process that comes from them found again in /proc.

Of a process that was started, its environment tells whose it is, and of one that was only forked its session.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from tests.programs import Program, Programs

ROOT = Path(__file__).resolve().parents[2]
_MARK = "HARMOENY_TEST_COMMAND"


class Command:
    """A command that runs in the repository's root; as a context manager it leaves no process behind.

    Args:
        folder: for its output.
        arguments: of Python.
        prefix: a command that starts Python.
        variables: of its environment.
        programs: starts it without the seconds of imports; None: a new interpreter, as its users start it.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        prefix: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        programs: Programs | None = None,
    ) -> None:
        self.mark = uuid.uuid4().hex
        self._log = folder / f"{self.mark}.log"
        own = {_MARK: self.mark} | dict(variables or {})
        self._process: Program | subprocess.Popen[bytes]
        with self._log.open("wb") as log:
            if programs is None:
                self._process = _interpreter((*prefix, sys.executable, *arguments), own, log)
            else:
                assert not prefix, "it is no interpreter that starts"
                self._process = programs.start(*arguments, output=log, variables=own)
        self.pid = self._process.pid

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._status(10) is not None
        if isinstance(self._process, Program):
            self._process.close()

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def errors(self) -> list[str]:
        """Return the error lines; a traceback would be one too many."""
        output = self.output()
        assert "Traceback" not in output, output
        return [line for line in output.splitlines() if line.startswith("error:")]

    def wait(self, timeout_s: float) -> int:
        """Return the exit status, as a shell would name it."""
        status = self._status(timeout_s)
        assert status is not None, f"still running after {timeout_s} s:\n{self.output()}"
        return status if status >= 0 else 128 - status

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait for something that the command does."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert self._status(0) is None, f"ended too early:\n{self.output()}"
            assert time.monotonic() < end, f"nothing happened in {timeout_s} s:\n{self.output()}"
            time.sleep(0.05)

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Signal the process, or its whole group as a terminal's Ctrl-C does."""
        (os.killpg if group else os.kill)(self.pid, number)

    def processes(self) -> set[int]:
        """Return the living processes that came from this command, whatever session or parent they have now."""
        found = set()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it ended meanwhile
                if entry.name.isdigit() and (self._of_session(entry) or self._marked(entry)):
                    found.add(int(entry.name))
        return found

    def remaining(self, timeout_s: float = 10.0) -> set[int]:
        """Return the processes that are left when they had ``timeout_s`` to go."""
        end = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def _status(self, timeout_s: float) -> int | None:
        """Return the exit status, negative for a signal's number; None: it has not ended by then."""
        if isinstance(self._process, Program):
            return self._process.status(timeout_s)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def _marked(self, entry: Path) -> bool:
        return f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes()

    def _of_session(self, entry: Path) -> bool:
        """Tell whether a process that has not ended is this one or of its session."""
        state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        return self.pid in (int(session), int(entry.name)) and state not in "ZX"


def _interpreter(words: Sequence[str], variables: Mapping[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment | {"COLUMNS": "200"} | dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
