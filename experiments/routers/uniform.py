"""Uniform routing: every expert gets the same number of assignments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.routers.base import Router, RoutingRequest, route_by_shares
from harmoeny.placement import IntArray


@dataclass(kw_only=True)
class UniformRouter(Router):
    """No skew at all."""

    name: ClassVar[str] = "uniform"
    description: ClassVar[str] = "every expert gets the same number of assignments"

    def assign(self, request: RoutingRequest) -> IntArray:
        """Route with counts that differ by at most one."""
        return route_by_shares(np.full(request.num_experts, 1 / request.num_experts), request)
