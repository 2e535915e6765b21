"""Static expert parallelism with a limit: a rank with more than its share drops what is above it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.kit.capacity import check_capacity_factor
from harmoeny.compiled import compiled
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan, home_tokens, plan_from_tokens
from harmoeny.policy import Policy


@dataclass(kw_only=True)
class Drop(Policy):
    """Token dropping: the paper's "drop" scheduling policy (arXiv 2506.12417), balanced but not exact.

    Attributes:
        capacity_factor: a rank executes at most this multiple of the average load.
    """

    name: ClassVar[str] = "drop"
    description: ClassVar[str] = "static, but overloaded ranks drop what is above the average (not exact)"
    exact: ClassVar[bool] = False

    capacity_factor: float = 1.0

    def validate(self) -> None:
        """Check the configuration.

        Raises:
            ValueError: a capacity factor that is not a positive, finite number.
        """
        super().validate()
        check_capacity_factor(self.capacity_factor)

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Keep what fits of ``counts`` (int64 ``[world_size, num_experts]``), in proportion over ranks and experts."""
        world_size = counts.shape[0]
        # Rounded, since 100 * 1.1 is a little more than 110.
        capacity = math.ceil(round(int(counts.sum()) * self.capacity_factor / world_size, 6))
        return plan_from_tokens(home_tokens(_keep(counts, placement.home, capacity), placement.home), placement)


@compiled
def _keep(counts: IntArray, home: IntArray, capacity: int) -> IntArray:
    """Return int64 ``[world_size, num_experts]``, what the ranks keep of ``counts`` under ``capacity`` each."""
    world_size, num_experts = counts.shape
    load = np.zeros(world_size, dtype=np.int64)
    for src in range(world_size):
        for expert in range(num_experts):
            load[home[expert]] += counts[src, expert]
    kept = counts.copy()
    reach = np.zeros(world_size, dtype=np.int64)
    for src in range(world_size):
        for expert in range(num_experts):
            rank = home[expert]
            if load[rank] > capacity:
                # Rounding the running sum, not the cells, keeps exactly `capacity` and never more than a cell has.
                before = reach[rank] * capacity // load[rank]
                reach[rank] += counts[src, expert]
                kept[src, expert] = reach[rank] * capacity // load[rank] - before
    return kept
