"""Static expert parallelism: every expert is executed where it lives, whatever the load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan, home_executed, home_tokens, plan_from_tokens
from harmoeny.policy import Policy


@dataclass(kw_only=True)
class StaticEP(Policy):
    """Expert parallelism as GShard introduced it (arXiv 2006.16668), without a capacity limit."""

    name: ClassVar[str] = "static_ep"
    description: ClassVar[str] = "every expert is executed on its home rank"

    def plan(self, counts: IntArray, placement: Placement) -> Plan:
        """Send all of ``counts`` (int64 ``[world_size, num_experts]``) to the home ranks."""
        return plan_from_tokens(home_tokens(counts, placement.home), placement)

    def executed(self, counts: IntArray, placement: Placement) -> IntArray:
        """Return int64 ``[num_experts, world_size]``: everything at home."""
        return home_executed(counts, placement)
