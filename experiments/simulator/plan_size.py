"""What it goes by how long a plan takes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.simulator.flows import Flows
from harmoeny.placement import IntArray, Placement


class PlanSize(NamedTuple):
    """What it goes by how long a plan takes; see :class:`SoftwareCost`.

    Attributes:
        num_entries: of its tokens.
        num_cells: ranks times experts.
        num_steps: expert moves, and ranks that drop assignments.
        copies: whether ranks hold experts that are at home elsewhere.
        staged: whether it has stages.
    """

    num_entries: int
    num_cells: int
    num_steps: int
    copies: bool
    staged: bool

    @property
    def terms(self) -> tuple[float, ...]:
        """How often a plan has each of ``PLAN_TERMS``, which of :class:`SoftwareCost` are what they take."""
        cells, moves = float(self.num_cells), self.num_steps > 0
        of_cells = (cells, moves * cells, self.copies * cells, self.staged * cells)
        return 1.0, float(self.num_entries), float(self.num_steps), *of_cells


def plan_size(flows: Flows, counts: IntArray, placement: Placement) -> PlanSize:
    """Return how large the plan is that flows come from.

    Args:
        flows: of the plan.
        counts: int64 ``[world_size, num_experts]``.
        placement: what it was planned from.
    """
    copies = bool((placement.routed.resident & ~placement.routed.at_home).any())
    steps = _num_steps(flows, counts, placement)
    return PlanSize(counts.size * len(counts), counts.size, steps, copies, flows.stage_traffic is not None)


def _num_steps(flows: Flows, counts: IntArray, placement: Placement) -> int:
    """Return the expert moves of a plan, and the ranks that drop assignments."""
    at_home = np.bincount(placement.home, weights=counts.sum(axis=0), minlength=placement.world_size)
    lost = int(counts.sum()) - int(flows.executed.sum())
    drops = int((flows.executed.sum(axis=0) < at_home).sum()) if lost else 0
    return int(flows.fetch.sum()) + drops
