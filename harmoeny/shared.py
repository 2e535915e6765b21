"""Shared experts that a model hands to the runtime: how the plan of the routed ones is completed with theirs.

A layer's shared experts stand behind its routed ones. Policies see neither their counts nor their places.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from harmoeny.compiled import compiled
from harmoeny.lines import Stages
from harmoeny.placement import IntArray, Placement
from harmoeny.plan import Plan
from harmoeny.policy import Policy
from harmoeny.relay import NOBODY
from harmoeny.stages import in_stages

_T = TypeVar("_T", np.bool_, np.int64)


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
    """Let a policy plan the routed experts, and complete the plan with stages and shared experts.

    Args:
        policy: the policy.
        counts: int64 ``[world_size, num_experts]`` of all experts; every shared one's are the tokens of the ranks.
        placement: the residency, of all experts.

    Raises:
        ValueError: the policy executes the shared experts of more or fewer tokens than there are.
    """
    num_shared = placement.num_shared
    plan = in_stages(policy.plan(routed_counts(counts, placement), placement.routed), policy.num_stages)
    if num_shared == 0:
        return plan
    num_tokens = counts[:, -1].copy()
    tokens, load = _with_room_for(plan.tokens, num_shared)
    pairs = policy.place_shared(num_tokens, load, num_shared)
    if pairs.min() < 0 or (pairs.sum(axis=1) != num_tokens).any():
        raise ValueError(f"place_shared: {pairs.sum(axis=1).tolist()} tokens, must be {num_tokens.tolist()} per rank")
    tokens[:, -num_shared:] = pairs[:, None]
    return replace(
        plan,
        tokens=tokens,
        fetch=_more(plan.fetch, num_shared, False),
        from_peer=None if plan.from_peer is None else _more(plan.from_peer, num_shared, False),
        host=None if plan.host is None else _more(plan.host, num_shared, False),
        predicted_s=None,  # it was of the routed experts alone
        stages=None if plan.stages is None else _with_shared(plan.stages, pairs.sum(axis=0), num_shared),
        senders=None if plan.senders is None else _more(plan.senders, num_shared, NOBODY),
        halved=None if plan.halved is None else _more(plan.halved, num_shared, False),
    )


def _with_shared(stages: Stages, num_tokens: IntArray, num_shared: int) -> Stages:
    """Return stages with the shared experts at the beginning of the first; ``num_tokens``: int64 ``[world_size]``."""
    shared, cuts = np.arange(num_shared)[:, None] * num_tokens, stages.cuts + num_shared * num_tokens
    cuts[0] = 0
    return Stages(np.concatenate([stages.begins + num_shared * num_tokens, shared]), cuts)


@compiled
def _with_room_for(routed: IntArray, num_shared: int) -> tuple[IntArray, IntArray]:
    """Return a plan's tokens with as many experts more, which execute nothing yet, and every rank's load.

    Args:
        routed: int64 ``[world_size(src), num_routed, world_size(dst)]``, of which most entries are 0.
        num_shared: experts more.
    """
    world_size, num_routed, _ = routed.shape
    tokens = np.zeros((world_size, num_routed + num_shared, world_size), dtype=np.int64)
    load = np.zeros(world_size, dtype=np.int64)
    for src in range(world_size):
        for expert in range(num_routed):
            for dst in range(world_size):
                number = routed[src, expert, dst]
                if number > 0:  # memory that is never written takes no time
                    tokens[src, expert, dst] = number
                    load[dst] += number
    return tokens, load


def _more(routed: npt.NDArray[_T], num_shared: int, value: int) -> npt.NDArray[_T]:
    """Return ``[num_experts, world_size]``: one value for the shared experts behind those of the routed ones."""
    shared = np.full((num_shared, routed.shape[1]), value, dtype=routed.dtype)
    return np.concatenate([routed, shared])
