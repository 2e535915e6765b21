"""Shared experts that a model hands to the runtime: how the plan of the routed ones is completed with theirs.

A layer's shared experts stand behind its routed ones. Policies see neither their counts nor their places.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy


def routed_counts(counts: IntArray, placement: Placement) -> IntArray:
    """Return int64 ``[world_size, num_routed]``, what a policy sees of counts of all experts."""
    return np.ascontiguousarray(counts[:, : -placement.num_shared]) if placement.num_shared else counts


def slots_of(policy: Policy, placement: Placement) -> int | None:
    """Return the slots of a rank in a layer: the policy's room, and one more for every shared expert.

    None: as many as it holds at the start.
    """
    room = policy.room(placement.num_experts - placement.num_shared, placement.world_size)
    return None if room is None else room + placement.num_shared


def make_plan(policy: Policy, counts: IntArray, placement: Placement) -> Plan:
    """Let a policy plan the routed experts, and complete the plan.

    Args:
        policy: the policy.
        counts: int64 ``[world_size, num_experts]`` of all experts; every shared one's are the tokens of the ranks.
        placement: the residency, of all experts.

    Raises:
        ValueError: the policy executes the shared experts of more or fewer tokens than there are.
    """
    num_shared = placement.num_shared
    if num_shared == 0:
        return policy.plan(counts, placement)
    plan = policy.plan(routed_counts(counts, placement), placement.routed)
    num_tokens = counts[:, -1].copy()
    pairs = policy.place_shared(num_tokens, plan.load(), num_shared)
    if pairs.min() < 0 or (pairs.sum(axis=1) != num_tokens).any():
        raise ValueError(f"place_shared: {pairs.sum(axis=1).tolist()} tokens, must be {num_tokens.tolist()} per rank")
    shared = np.repeat(pairs[:, None], num_shared, axis=1)
    return replace(
        plan,
        tokens=np.concatenate([plan.tokens, shared], axis=1),
        fetch=_none_shared(plan.fetch, num_shared),
        from_peer=None if plan.from_peer is None else _none_shared(plan.from_peer, num_shared),
        host=None if plan.host is None else _none_shared(plan.host, num_shared),
        predicted_s=None,  # it was of the routed experts alone
    )


def _none_shared(routed: BoolArray, num_shared: int) -> BoolArray:
    """Return bool ``[num_experts, world_size]``: false for the shared experts."""
    return np.concatenate([routed, np.zeros((num_shared, routed.shape[1]), dtype=np.bool_)])
