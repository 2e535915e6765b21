"""The model's own routers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from experiments.routers.base import Router, RoutingRequest
from harmoeny.placement import IntArray


@dataclass(kw_only=True)
class ModelRouter(Router):
    """The choice of the untouched model on the same batch, recorded before timing and replayed to every system."""

    name: ClassVar[str] = "model"
    description: ClassVar[str] = "the model's own routing decisions"
    from_model: ClassVar[bool] = True

    def assign(self, request: RoutingRequest) -> IntArray:
        """Never called: the decisions are recorded from the model."""
        raise NotImplementedError("router=model: decisions are recorded from the model, not assigned")
