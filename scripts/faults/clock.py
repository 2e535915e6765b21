"""A clock that jumps, in one process of the run and never on the machine."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

from scripts.faults.fault import Fault, Planted, end, fault, moment
from scripts.faults.sweep import SKEWS, TinySweep, ranks_of

_HOOK = Path(__file__).with_name("hook")
_LAYOUT = "qdd"
#: Seconds, as by a clock that is set right, a machine that slept, or a wrong date.
_JUMPS_S = (-86400.0, -30.0, -0.02, 0.02, 30.0, 86400.0)


class _ClockJump(Fault):
    """A jump while the sweep runs, in the launcher or in a rank."""

    monotonic = False
    errors: tuple[str, ...] = ()

    def plant(self, sweep: TinySweep, rng: Random) -> Planted:
        """Let the clock jump once; it never comes back."""
        jump_s, in_rank = rng.choice(_JUMPS_S), sweep.backend == "ranks" and rng.random() < 0.7
        planted = Planted(
            f"{self.name} by {jump_s:g} s in {'a rank' if in_rank else 'the launcher'}",
            statuses=(1,) if self.errors else (),
            errors=self.errors,
        )
        switch = sweep.folder / "clock"
        switch.write_bytes(struct.pack(_LAYOUT, 0, 0.0, 0.0))
        when = moment(rng, points=len(SKEWS) - len(sweep.points()))
        with sweep.start(variables={"CLOCK_JUMP": str(switch), "PYTHONPATH": str(_HOOK)}) as command:
            if when(command):
                planted.before = sweep.finished()
                victim = rng.choice(ranks_of(command) or [command.pid]) if in_rank else command.pid
                shifts = (0.0, jump_s) if self.monotonic else (jump_s, 0.0)
                with switch.open("r+b") as file:
                    file.write(struct.pack(_LAYOUT, victim, *shifts))
                planted.struck = True
            planted.ended.append(end(command))
        return planted


@fault
class WallClockJump(_ClockJump):
    """The date changes, as NTP or an administrator may do: nothing may come of it."""

    name = "date jumps"


@fault
class MonotonicClockJump(_ClockJump):
    """The clock that is measured with jumps: the run is refused where that could be in a number."""

    name = "monotonic clock jumps"
    monotonic = True
    errors = (r"rank [01] .*clock .*jumped",)
