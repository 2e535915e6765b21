"""What a fault is, and the list of all of them."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import ClassVar

import psutil

from scripts.faults.sweep import SKEWS, TinySweep
from tests.experiments.command import Command

#: How long a command of the sweep may take where nothing stops it, and its processes to go when it has ended.
RUN_S, GONE_S = 240, 10


class NotHereError(Exception):
    """A fault cannot be planted on this machine; the message says why."""


@dataclass
class Ended:
    """How a command ended.

    Attributes:
        status: its exit status, as a shell names it.
        output: what it printed.
        stray: processes that outlived it.
    """

    status: int
    output: str
    stray: set[int]


@dataclass
class Planted:
    """What was done, and what came of it.

    Attributes:
        what: the fault with its choices, in words.
        ended: how the commands ended that were to bear it.
        before: the files of the points that were finished when it struck, with their digests.
        struck: whether it found something to strike; a command that had ended before has to end as if nothing were.
        statuses: exit statuses that are right for commands that were struck; 0 is right beside them.
        errors: what the one error line matches then, each of several alternatives; none: there is no error line.
        leaves: whether nobody was left to clean up, so that a manifest says running and temporary files stay.
        keeps: whether nothing could be removed from the folder of temporary files.
        torchrun: whether it started the ranks; its report, with a traceback, and its folder are no work of ours.
    """

    what: str
    ended: list[Ended] = field(default_factory=list)
    before: dict[str, str] = field(default_factory=dict)
    struck: bool = False
    statuses: tuple[int, ...] = ()
    errors: tuple[str, ...] = ()
    leaves: bool = False
    keeps: bool = False
    torchrun: bool = False

    def explains(self, line: str) -> bool:
        """Tell whether an error line is one that names the fault."""
        return any(re.search(pattern, line) for pattern in self.errors)


class Fault(ABC):
    """One kind of fault.

    Attributes:
        name: what it is called.
        backends: those that it can strike.
    """

    name: ClassVar[str]
    backends: ClassVar[Sequence[str]] = ("ranks", "simulator")

    def missing(self, rng: Random) -> list[int]:
        """Choose the points that are not finished yet: one or all."""
        return rng.sample(range(len(SKEWS)), k=rng.randint(1, len(SKEWS)))

    @abstractmethod
    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Run the sweep, strike at a moment that ``rng`` chooses, and wait for the end.

        Raises:
            NotHereError: this machine does not allow it.
            AssertionError: a command did not end.
        """


FAULTS: list[Fault] = []


def fault(cls: type[Fault]) -> type[Fault]:
    """Add a fault to the list."""
    FAULTS.append(cls())
    return cls


def end(command: Command, timeout_s: float = RUN_S) -> Ended:
    """Wait until a command and all of its processes have ended."""
    status = command.wait(timeout_s)
    return Ended(status, command.output(), stray=command.remaining(GONE_S))


def moment(rng: Random, *, points: int, until: float = 1.0) -> Callable[[Command], bool]:
    """Choose a moment of the sweep: a while after a line that it prints, of which a point has about six.

    Args:
        rng: chooses.
        points: that the sweep still measures.
        until: share of the sweep after which no moment lies.

    Returns:
        What waits for that moment and tells whether the command still runs then.
    """
    lines = rng.randint(0, round(until * (6 * points + 1)))
    delay_s = rng.uniform(0.0, 0.5 if lines else 2.5)

    def wait(command: Command) -> bool:
        process = psutil.Process(command.pid)
        while is_running(process) and command.output().count("\n") < lines:
            time.sleep(0.02)
        until = time.monotonic() + delay_s
        while is_running(process) and (time.monotonic() < until or _starts(process)):
            time.sleep(0.01)
        return is_running(process)

    return wait


def is_running(process: psutil.Process) -> bool:
    """Tell whether a process has not ended."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _starts(process: psutil.Process) -> bool:
    """Tell whether a process may still be Python coming up, before it read a line of ours."""
    try:
        return bool(process.cpu_times().user < 0.25)
    except psutil.Error:
        return False
