"""HarMoEny: load-balanced expert-parallel inference of Mixture-of-Experts models (arXiv 2506.12417)."""

from harmoeny.placement import Placement, place
from harmoeny.plan import Plan, plan_from_tokens
from harmoeny.policy import ExpertCost, Policy
from harmoeny.rebalance import HarMoEny

__all__ = ["ExpertCost", "HarMoEny", "Placement", "Plan", "Policy", "place", "plan_from_tokens"]
