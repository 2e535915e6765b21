"""What of a plan costs time: what ranks execute, what they fetch, and how many assignments go from where to where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_array

from experiments.routers.base import FloatArray
from harmoeny.lines import Stages, stage_tokens
from harmoeny.modelled import ChoosesShares, ChosenShares, PredictsExecuted
from harmoeny.placement import BoolArray, IntArray, Placement
from harmoeny.plan import pairs_of_shares
from harmoeny.policy import Policy
from harmoeny.shared import make_plan

#: Plans whose ``tokens`` would be larger than this are never made, if the policy can do without.
_LARGEST_PLAN_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Flows:
    """A plan without its largest array.

    Attributes:
        executed: int64 ``[num_experts, world_size]``, assignments executed per expert and rank.
        fetch: bool ``[num_experts, world_size]``, experts that a rank executes and does not hold.
        from_peer: bool ``[num_experts, world_size]``, the fetches that peers send with ``fetch=peer``; None: all.
        traffic: float64 ``[world_size(src), world_size(dst)]``, assignments that go from rank to rank.
        computed: int64 ``[num_experts, world_size]``, rows that are computed, padding too; None: those executed.
        slices: int64 ``[num_stages, num_experts, world_size]``, the rows that are executed apart where a system
            executes them as they arrive: a rank's own, then those of every group of ranks, or those of every stage;
            None: all together.
        stage_traffic: float64 ``[num_stages, world_size(src), world_size(dst)]``, assignments that go from rank to
            rank in one exchange after the other; None: all in one.
        predicted_s: seconds from the plan to the end of the combine, as the policy predicts them; None: it does not.
        host: bool ``[num_experts, world_size]``, what a rank executes on its host; None: nothing.
        senders: int64 ``[num_experts, world_size]``, as of a plan; None: home ranks.
        halved: bool ``[num_experts, world_size]``, as of a plan; None: none.
    """

    executed: IntArray
    fetch: BoolArray
    traffic: FloatArray
    from_peer: BoolArray | None = None
    computed: IntArray | None = None
    slices: IntArray | None = None
    stage_traffic: FloatArray | None = None
    predicted_s: float | None = None
    host: BoolArray | None = None
    senders: IntArray | None = None
    halved: BoolArray | None = None

    @property
    def rows(self) -> IntArray:
        """int64 ``[num_experts, world_size]``, rows that are computed, padding too."""
        return self.executed if self.computed is None else self.computed

    @property
    def stages(self) -> IntArray:
        """int64 ``[num_stages, num_experts, world_size]``, the same by the stage of the exchange that brings them."""
        return self.rows[None] if self.slices is None else self.slices

    def first_traffic(self) -> FloatArray | None:
        """Return float64 ``[world_size(src), world_size(dst)]``, as :meth:`harmoeny.plan.Plan.first_traffic`."""
        if self.stage_traffic is not None:
            first: FloatArray = self.stage_traffic[0]
            return first
        return None if self.slices is None else np.diag(self.traffic.diagonal())


def plan_fits(counts: IntArray) -> bool:
    """Return whether the plan of ``counts`` (int64 ``[world_size, num_experts]``) has room in memory."""
    return int(counts.nbytes) * len(counts) <= _LARGEST_PLAN_BYTES


def plan_flows(policy: Policy, counts: IntArray, placement: Placement) -> Flows:
    """Let a policy plan; a plan too large to be made is replaced by what :class:`PredictsExecuted` says.

    That knows nothing of shared experts, nor of stages that a policy does not choose: with these, every plan is made.

    Args:
        policy: the policy.
        counts: int64 ``[world_size, num_experts]``, of all experts.
        placement: the present residency.
    """
    made = plan_fits(counts) or placement.num_shared > 0 or policy.num_stages not in (None, 1)
    if not made and isinstance(policy, ChoosesShares):
        return _flows_of_shares(counts, policy.choose(counts, placement), placement)
    if not made and isinstance(policy, PredictsExecuted):
        executed = policy.executed(counts, placement)
        if executed is not None:
            return flows_of_executed(counts, executed, placement)
    plan = make_plan(policy, counts, placement)
    slices = stage_traffic = None
    if plan.source_groups is not None:
        slices = _slices(plan.tokens, plan.source_groups)
    elif plan.stages is not None:
        slices, stage_traffic = _by_stage(plan.tokens, plan.stages)
    traffic = plan.tokens.sum(axis=1).astype(np.float64)
    return Flows(
        plan.executed(),
        plan.fetch,
        traffic,
        plan.from_peer,
        slices=slices,
        stage_traffic=stage_traffic,
        predicted_s=plan.predicted_s,
        host=plan.host,
        senders=plan.senders,
        halved=plan.halved,
    )


def _by_stage(tokens: IntArray, stages: Stages) -> tuple[IntArray, FloatArray]:
    """Return :attr:`Flows.slices` and :attr:`Flows.stage_traffic` of a plan's tokens."""
    executed: IntArray = tokens.sum(axis=0)
    bounds = stages.bounds(executed)
    parts = [stage_tokens(tokens, np.stack(pair)[:, None], executed)[0] for pair in pairwise(bounds)]
    slices, traffic = (np.stack([part.sum(axis=axis) for part in parts]) for axis in (0, 1))
    return slices, traffic.astype(np.float64)


def _slices(tokens: IntArray, groups: Sequence[Sequence[int]]) -> IntArray:
    own = np.einsum("ses->es", tokens)
    others = tokens.copy()
    everyone = np.arange(len(tokens))
    others[everyone, :, everyone] = 0
    return np.stack([own, *(others[list(group)].sum(axis=0) for group in groups)])


def _flows_of_shares(counts: IntArray, chosen: ChosenShares, placement: Placement) -> Flows:
    """Return the flows of shares; own assignments come first, so that stages are exact."""
    executed = np.ascontiguousarray(chosen.shares.T)
    pairs = pairs_of_shares(counts, executed, chosen.stages, chosen.node_ranks).astype(np.float64)
    own = np.minimum(counts, chosen.shares).T
    slices = np.stack([own, executed - own]) if chosen.overlapped else None
    staged = chosen.stages.num_stages > 0
    if staged:
        slices = np.diff(chosen.stages.bounds(executed), axis=0)
    fetch = (executed > 0) & ~placement.resident
    senders = chosen.senders if chosen.senders.size else None
    return Flows(
        executed,
        fetch,
        pairs.sum(axis=0),
        chosen.from_peer,
        slices=slices,
        stage_traffic=pairs if staged else None,
        predicted_s=chosen.predicted_s,
        senders=senders,
        halved=chosen.halved if chosen.halved.any() else None,
    )


def flows_of_executed(counts: IntArray, executed: IntArray, placement: Placement) -> Flows:
    """Work out who sends what where, if ranks execute as many of their own assignments as they can.

    What a rank has above that goes to the ranks that lack some, in proportion. What every rank sends and receives is
    exact; the pairs are averages.

    Args:
        counts: int64 ``[world_size, num_experts]``.
        executed: int64 ``[num_experts, world_size]``; every expert's sum is that of ``counts``.
        placement: the present residency.
    """
    own = np.minimum(counts, executed.T)
    surplus = (counts - own).astype(np.float64)
    lacking = executed - own.T
    share = lacking / np.maximum(lacking.sum(axis=1, keepdims=True), 1)
    # Few ranks execute an expert, so most shares are 0.
    traffic: FloatArray = np.ascontiguousarray((csr_array(share.T) @ surplus.T).T)
    traffic[np.diag_indices_from(traffic)] += own.sum(axis=1)
    return Flows(executed, (executed > 0) & ~placement.resident, traffic)


def capped(flows: Flows, counts: IntArray, capacity: int, placement: Placement) -> Flows:
    """Leave out what of ``counts`` (int64 ``[world_size, num_experts]``) is above ``capacity`` per rank and expert."""
    if counts.max() <= capacity:
        return flows
    kept = np.minimum(counts, capacity)
    executed = np.where(np.arange(len(counts)) == placement.home[:, None], kept.sum(axis=0)[:, None], 0)
    return flows_of_executed(kept, executed, placement)
