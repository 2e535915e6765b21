"""Uniform routing: every expert gets the same number of assignments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from experiments.routers.base import FloatArray, RoutingRequest, SharesRouter


@dataclass(kw_only=True)
class UniformRouter(SharesRouter):
    """No skew at all."""

    name: ClassVar[str] = "uniform"
    description: ClassVar[str] = "every expert gets the same number of assignments"

    def shares(self, request: RoutingRequest) -> FloatArray:
        """Return equal shares."""
        return np.full(request.num_experts, 1 / request.num_experts)
