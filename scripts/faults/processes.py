"""Faults of processes: signals to a rank or to the launcher, and a second start beside the first."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from random import Random
from typing import ClassVar

from scripts.faults.fault import GONE_S, Fault, Planted, end, fault, moment
from scripts.faults.sweep import SKEWS, TinySweep, ranks_of
from tests.experiments.command import Command

_TIMEOUT_S = 8
#: What may pass beyond timeout_s until the last process of a run with a stopped rank is gone.
_GRACE_S = 5


def _missing(sweep: TinySweep) -> int:
    return len(SKEWS) - len(sweep.points())


def _some_rank(command: Command, rng: Random) -> int | None:
    """Wait until all ranks of a point are there and choose one; None where the command ends before."""
    while command.processes():
        if len(ranks := ranks_of(command)) == 2:
            return rng.choice(ranks)
        time.sleep(0.02)
    return None


class _RankSignal(Fault):
    """A signal to a rank, once both are there."""

    backends = ("ranks",)
    number: ClassVar[signal.Signals]
    errors: ClassVar[tuple[str, ...]]
    options: ClassVar[tuple[str, ...]] = ()

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Strike one of the ranks of whichever point is being run."""
        planted = Planted(f"{self.number.name} to a rank", statuses=(1,), errors=self.errors)
        # Ranks are there in the middle of a point only: what waits for them must not begin at its end.
        when = moment(rng, points=_missing(sweep), until=0.5)
        with sweep.start(*self.options) as command:
            victim = _some_rank(command, rng) if when(command) else None
            if victim is not None:
                planted.before = sweep.finished()
                with suppress(ProcessLookupError):
                    os.kill(victim, self.number)
                    planted.struck = True
            self.follow(command)
            planted.ended.append(end(command))
        return planted

    def follow(self, command: Command) -> None:
        """Look at what comes next."""


@fault
class KillRank(_RankSignal):
    """SIGKILL, as by the kernel that is out of memory."""

    name, number = "kill a rank", signal.SIGKILL
    errors = (r"rank [01] \(pid \d+\) was killed by SIGKILL; all ranks were stopped",)


@fault
class StopRank(_RankSignal):
    """SIGSTOP: the process is there and does nothing any more."""

    name, number = "stop a rank", signal.SIGSTOP
    options = (f"timeout_s={_TIMEOUT_S}",)
    errors = (
        r"rank [01].*a stopped process.* did not answer any more",
        r"rank [01], which never began, did not answer",
    )

    def follow(self, command: Command) -> None:
        """Hold the run to its time."""
        struck_s = time.monotonic()
        stopped = ranks_of(command)
        while stopped and set(stopped) & command.processes():
            took_s = time.monotonic() - struck_s
            assert took_s < 30 + _TIMEOUT_S + _GRACE_S, f"{took_s:.0f} s with a stopped rank:\n{command.output()}"
            time.sleep(0.1)


class _LauncherSignals(Fault):
    """Signals to the launcher, in this order; ``group``: to its whole process group, as a terminal sends them."""

    numbers: ClassVar[Sequence[signal.Signals]]
    group: ClassVar[bool] = False

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Strike whatever it does."""
        first = self.numbers[0]
        killed = first == signal.SIGKILL
        errors = () if killed else (r"^interrupted: all ranks were stopped",)
        planted = Planted(
            f"{', '.join(number.name for number in self.numbers)} to the launcher{' and its group' * self.group}",
            statuses=tuple(128 + number for number in set(self.numbers)),
            errors=errors,
            leaves=killed,
        )
        when = moment(rng, points=_missing(sweep))
        with sweep.start() as command:
            if when(command):
                planted.before = sweep.finished()
                for number in self.numbers:
                    with suppress(ProcessLookupError):
                        command.signal(number, group=self.group)
                        planted.struck = True
                    time.sleep(rng.uniform(0.05, 0.6))
            planted.ended.append(end(command))
        return planted


@fault
class KillLauncher(_LauncherSignals):
    """SIGKILL: nobody is left to tidy up."""

    name, numbers = "kill the launcher", (signal.SIGKILL,)


@fault
class InterruptLauncher(_LauncherSignals):
    """SIGINT, as by `kill -INT`."""

    name, numbers = "interrupt the launcher", (signal.SIGINT,)


@fault
class TerminateLauncher(_LauncherSignals):
    """SIGTERM, as by a scheduler."""

    name, numbers = "terminate the launcher", (signal.SIGTERM,)


@fault
class CtrlCTwice(_LauncherSignals):
    """An impatient user."""

    name, numbers, group = "Ctrl-C twice", (signal.SIGINT, signal.SIGINT), True


@fault
class PauseLauncher(Fault):
    """Ctrl-Z and `fg`: nothing may come of it."""

    name = "pause the launcher"

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Stop the launcher for a while that is shorter than timeout_s."""
        pause_s = rng.uniform(0.5, 4.0)
        planted = Planted(f"SIGSTOP to the launcher for {pause_s:.1f} s")
        when = moment(rng, points=_missing(sweep))
        with sweep.start() as command:
            if when(command):
                planted.before = sweep.finished()
                command.signal(signal.SIGSTOP)
                time.sleep(pause_s)
                command.signal(signal.SIGCONT)
                planted.struck = True
            planted.ended.append(end(command))
        return planted


@fault
class SecondStart(Fault):
    """The same command again while the first one runs, which may be killed then."""

    name = "second start"

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Start both; the second waits, or takes over from the first."""
        kill = rng.random() < 0.5
        planted = Planted(f"a second start{', and SIGKILL to the first launcher' * kill}", leaves=kill)
        when, later_s = moment(rng, points=_missing(sweep)), rng.uniform(0.0, 6.0)
        with sweep.start() as first:
            planted.struck = when(first)
            planted.before = sweep.finished()
            with sweep.start() as second:
                if kill:
                    time.sleep(later_s)
                    with suppress(ProcessLookupError):
                        first.signal(signal.SIGKILL)
                    assert first.remaining(GONE_S) == set(), first.output()
                else:
                    planted.ended.append(end(first))
                planted.ended.append(end(second))
        return planted
