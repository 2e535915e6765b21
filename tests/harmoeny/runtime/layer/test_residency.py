"""What a system remembers of its batches, and what it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.static_ep import StaticEP
from harmoeny.choices import Knowledge
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.runtime.layer.residency import Residency

#: Of all policies of a test, copies too: how many batches they had seen when they were asked to place, and planned.
asked: list[int] = []
planned_from: list[list[int]] = []


@dataclass
class Turns(StaticEP):
    """Swaps the homes of two experts after every other batch."""

    knows: ClassVar[frozenset[Knowledge]] = frozenset({Knowledge.EXACT, Knowledge.HISTORY})
    num_asked: int = 0

    def update_placement(self, layer: int, history: Sequence[IntArray], placement: Placement) -> Placement | None:  # noqa: ARG002
        self.num_asked += 1
        asked.append(len(history))
        return Placement.from_home(placement.home[::-1].copy(), 2) if len(history) % 2 else None

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        planned_from.append(placement.home.tolist())
        return super().plan(counts, placement)


def test_a_rehearsal_goes_through_batches_and_leaves_nothing_behind() -> None:
    asked.clear()
    planned_from.clear()
    policy, placements = Turns(), [Placement.from_home(np.array([0, 1]), 2)]
    residency, counts = Residency(policy, placements), np.array([[3, 1], [3, 1]])
    residency.rehearse(4)
    assert asked == [], "nothing was seen as yet"
    residency.update(0, counts)
    residency.rehearse(4)
    assert asked == [0, 0, 1, 2, 3]
    assert planned_from == [[0, 1], [1, 0], [1, 0], [0, 1]]
    assert policy.num_asked == 1
    assert placements[0].home.tolist() == [0, 1]
    residency.update(0, counts)
    assert asked[-1] == 1, "of the batches, only what was executed is remembered"
