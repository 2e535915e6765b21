"""Commands under test, each in a session of its own, and every process that comes from them found again in /proc."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_MARK = "HARMOENY_TEST_COMMAND"


class Command:
    """A command that runs in the repository's root; as a context manager it leaves no process behind.

    Args:
        folder: for its output.
        arguments: of Python.
        prefix: a command that starts Python.
        variables: of its environment.
    """

    def __init__(
        self, folder: Path, *arguments: str, prefix: Sequence[str] = (), variables: Mapping[str, str] | None = None
    ) -> None:
        self.mark = uuid.uuid4().hex
        self._log = folder / f"{self.mark}.log"
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, *arguments],
                cwd=ROOT,
                env=environment | {_MARK: self.mark, "COLUMNS": "200"} | dict(variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        self._process.wait(timeout=10)

    def output(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def errors(self) -> list[str]:
        """Return the error lines; a traceback would be one too many."""
        output = self.output()
        assert "Traceback" not in output, output
        return [line for line in output.splitlines() if line.startswith("error:")]

    def wait(self, timeout_s: float) -> int:
        """Return the exit status, as a shell would name it."""
        try:
            status = self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output()}") from None
        return status if status >= 0 else 128 - status

    def wait_until(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait for something that the command does."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, f"ended too early:\n{self.output()}"
            assert time.monotonic() < end, f"nothing happened in {timeout_s} s:\n{self.output()}"
            time.sleep(0.05)

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Signal the process, or its whole group as a terminal's Ctrl-C does."""
        (os.killpg if group else os.kill)(self.pid, number)

    def processes(self) -> set[int]:
        """Return the living processes that came from this command, whatever session or parent they have now."""
        found = set()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and f"{_MARK}={self.mark}".encode() in (entry / "environ").read_bytes():
                    found.add(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
        return found

    def remaining(self, timeout_s: float = 10.0) -> set[int]:
        """Return the processes that are left when they had ``timeout_s`` to go."""
        end = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        return left
