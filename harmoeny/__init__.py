"""HarMoEny: load-balanced expert-parallel inference of Mixture-of-Experts models (arXiv 2506.12417)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from harmoeny.cost import ExpertCost
from harmoeny.placement import Placement, place
from harmoeny.plan import Plan, plan_from_tokens
from harmoeny.policy import Policy
from harmoeny.rebalance import TokenHarMoEny
from harmoeny.timed import HarMoEny

if TYPE_CHECKING:
    from harmoeny.session import Session, attach, detach, load, register

__all__ = [
    "ExpertCost",
    "HarMoEny",
    "Placement",
    "Plan",
    "Policy",
    "Session",
    "TokenHarMoEny",
    "attach",
    "detach",
    "load",
    "place",
    "plan_from_tokens",
    "register",
]

#: What needs PyTorch and Transformers, which take seconds to import: imported when it is first asked for.
_LAZY = ("Session", "attach", "detach", "load", "register")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module("harmoeny.session"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
