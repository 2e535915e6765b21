"""A system that misbehaves in mid-run when a file tells it to."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from baselines.static_ep import StaticEP
from harmoeny.choices import Knowledge
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan

#: The checks and the warm-up need fewer plans.
_PLANS_BEFORE_FAULT = 8


@dataclass(kw_only=True)
class Faulty(StaticEP):
    """Static EP until ``switch`` exists: then rank 1 raises or stalls, as the file says, in a measured round."""

    name: ClassVar[str] = "faulty"
    description: ClassVar[str] = "fails on purpose"
    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT})

    switch: str
    num_plans: int = field(default=0, init=False)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        self.num_plans += 1
        switch = Path(self.switch)
        if os.environ["RANK"] == "1" and self.num_plans > _PLANS_BEFORE_FAULT and switch.exists():
            if switch.read_text() == "raise":
                raise RuntimeError("broken on purpose")
            reached(switch).write_text(str(os.getpid()))
            time.sleep(600)
        return super().plan(counts, placement)


def reached(switch: Path) -> Path:
    """Return the file in which a stalled rank leaves its process id."""
    return switch.with_suffix(".reached")
